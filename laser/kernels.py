from .sparse_coding import nearest_entry  # for laser.bottleneck, until it imports it from there
