"""What needs worker processes or many random cases: the loaders' promise that a batch is a pure function of (seed, epoch, step)."""
import hashlib
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from laser.data import CachedImages, EpochSampler, FolderImages, SampleCrops, make_loaders, part_by_name, random_order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root/f"{i:02}.png")
    return root


def batches(loader, epoch, start_step=0):
    loader.batch_sampler.set_epoch(epoch, start_step)
    return [batch.clone() for batch in loader]


def same(some, others):
    return len(some) == len(others) and all(a.equal(b) for a, b in zip(some, others))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 9))
def test_shares_of_all_processes_make_up_the_global_batches(n, share, world_size, epoch, shuffle, drop_last, seed):
    batch_size = share * world_size
    if drop_last and n < batch_size: drop_last = False
    options = dict(batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last)
    one = EpochSampler(n, **options)
    one.set_epoch(epoch)
    whole = list(one)
    keys = [key for batch in whole for key in batch]
    assert len(set(keys)) == len(keys) == (n - n % batch_size if drop_last else n)
    assert {key[0] for key in keys} <= {epoch}
    shares = []
    for rank in range(world_size):
        part = EpochSampler(n, rank=rank, world_size=world_size, **options)
        part.set_epoch(epoch)
        shares.append(list(part))
        assert len(shares[-1]) <= len(part) == len(whole)
    for step, batch in enumerate(whole):
        assert sum((part[step] for part in shares if step < len(part)), []) == batch
    for start in range(len(whole) + 1):                       # resume anywhere
        one.set_epoch(epoch, start)
        assert list(one) == whole[start:] and len(one) == len(whole) - start


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_random_order_is_a_permutation(n, seed, epoch):
    assert sorted(random_order(n, seed, epoch)) == list(range(n))


NAMES = [f"Ordner {i % 7}/{kind}_{i:03}.jpg" for i in range(65) for kind in ("Übung", "été", "图片", "b")]


def write(root, names):
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(root/name)


def parts_of(root, **options):
    """Name below the folder -> part, of every image, each in one part only."""
    parts = {}
    for split in ("train", "val", "test"):
        for path in FolderImages(root, split, size=8, **options).files:
            name = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
            assert name not in parts
            parts[name] = split
    return parts


def right_part(name):
    place = int(hashlib.sha256(name.lower().encode("utf-8")).hexdigest()[:16], 16)/2**64
    return "val" if place < 0.1 else "test" if place < 0.2 else "train"


def test_an_images_part_depends_on_its_name_alone(tmp_path):
    write(tmp_path/"set", NAMES[:200])
    parts = parts_of(tmp_path/"set")
    assert parts == {name: right_part(name) for name in NAMES[:200]}
    assert set(parts.values()) == {"train", "val", "test"}
    assert parts_of(tmp_path/"set", seed=1) == parts                                       # evaluation with another seed
    write(tmp_path/"set", NAMES)                                                           # 200 files, then 260
    grown = parts_of(tmp_path/"set")
    assert len(grown) == 260 and {name: grown[name] for name in parts} == parts
    write(tmp_path/"elsewhere", [unicodedata.normalize("NFD", name) for name in NAMES])    # as macOS writes them
    assert parts_of(tmp_path/"elsewhere") == grown
    chosen = parts_of(tmp_path/"set", limit=10, seed=3)
    assert len(chosen) == 30 and all(grown[name] == part for name, part in chosen.items())


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_every_spelling_of_a_name_has_one_part(name):
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    assert len({part_by_name(form) for form in forms}) == 1
    shares = [(0, 0), (1, 0), (0, 1)]
    assert [part_by_name(name, *share) for share in shares] == ["train", "val", "test"]


def test_an_empty_part_is_an_error_that_says_how_to_mend_it(tmp_path):
    write(tmp_path, ["b.png"])
    assert right_part("b.png") == "train" and len(FolderImages(tmp_path, "train")) == 1
    for split in ("val", "test"):
        with pytest.raises(ValueError, match="subfolders train, val and test, or add more images"): FolderImages(tmp_path, split)
    (tmp_path/"caf\udce9.png").write_bytes((tmp_path/"b.png").read_bytes())                # a name that is not UTF-8
    assert {part_by_name(path.relative_to(tmp_path)) for path in FolderImages(tmp_path).files} <= {"train", "val", "test"}
    assert len(FolderImages(tmp_path)) == 2


@pytest.mark.parametrize("method, workers, cache", [("fork", 2, True), ("fork", 1, False), ("spawn", 1, True)])
def test_workers_change_nothing(folder, method, workers, cache):
    if method not in torch.multiprocessing.get_all_start_methods(): pytest.skip(f"this system cannot {method}")
    images = FolderImages(folder, size=32)
    options = dict(batch_size=4, seed=3)
    plain, _ = make_loaders(images, images, num_workers=0, **options)
    expected = [batches(plain, epoch) for epoch in range(3)]
    worked, _ = make_loaders(images, images, num_workers=workers, cache=cache, **options)
    worked.multiprocessing_context = method
    for epoch in (0, 1, 2): assert same(batches(worked, epoch), expected[epoch])           # persistent workers see each epoch
    assert same(batches(worked, 1, start_step=2), expected[1][2:])                         # and a start in mid-epoch
    if cache: assert worked.dataset.images.images.known.all()                              # one cache, filled by the workers


def test_an_epoch_that_was_left_early_leaves_nothing_behind(folder):
    images = FolderImages(folder, size=32)
    plain, _ = make_loaders(images, images, batch_size=2, num_workers=0)
    worked, _ = make_loaders(images, images, batch_size=2, num_workers=2)
    worked.batch_sampler.set_epoch(0)
    next(iter(worked))                                                                     # the workers have prefetched more
    assert same(batches(worked, 5), batches(plain, 5))


def test_crops_differ_by_epoch_in_workers():
    sets = SampleCrops("train", size=32, limit=8), SampleCrops("val", size=32, limit=8)
    plain, _ = make_loaders(*sets, batch_size=4, num_workers=0)
    worked, val = make_loaders(*sets, batch_size=4, num_workers=1)
    epochs = [batches(plain, epoch) for epoch in (0, 1)]
    assert same(batches(worked, 0), epochs[0]) and same(batches(worked, 1), epochs[1]) and not same(*epochs)
    assert same(list(val), list(val))


def test_a_damaged_file_stops_the_epoch_and_is_named(folder, tmp_path):
    for path in folder.iterdir(): (tmp_path/path.name).write_bytes(path.read_bytes())
    whole = (tmp_path/"07.png").read_bytes()
    (tmp_path/"07.png").write_bytes(whole[:len(whole) // 2])
    images = FolderImages(tmp_path, size=32)
    for workers, cache in ((0, False), (1, False), (0, True)):
        loader, _ = make_loaders(images, images, batch_size=4, num_workers=workers, cache=cache)
        with pytest.raises(OSError, match="07.png"): batches(loader, 0)


def test_cache_decodes_each_image_once(folder, monkeypatch):
    images = FolderImages(folder, size=32)
    read = []
    decode = FolderImages.pixels
    monkeypatch.setattr(FolderImages, "pixels", lambda self, index, epoch=0: read.append(index) or decode(self, index))
    loader, _ = make_loaders(images, images, batch_size=4, num_workers=0, cache=True)
    for epoch in range(3): batches(loader, epoch)
    assert sorted(read) == list(range(12)) and CachedImages(images).nbytes == 12 * 3 * 32 * 32
