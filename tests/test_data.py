"""What needs worker processes or many random cases: the loaders' promise that a batch is a pure function of (seed, epoch, step)."""
import hashlib
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from laser.data import (CachedImages, EpochSampler, FolderImages, SampleCrops, get_dataset, image_files, load_image, make_loaders,
                        part_by_name, read_rgb)


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


def png(width, height, depth, kind, rows, extra=b""):
    """A PNG file by hand: what Pillow cannot write, or what lies about its size."""
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def transparent(*values):
    """The chunk that names one colour, in 16-bit values, as transparent."""
    data = b"".join(struct.pack(">H", value) for value in values)
    return struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))


COLOUR = (200, 40, 120)
GREY = round(0.299*COLOUR[0] + 0.587*COLOUR[1] + 0.114*COLOUR[2])            # the luma that mode L keeps
ZOO = [                                                                      # file, format, mode, error that its format may make
    ("a.jpg", "JPEG", "RGB", 3), ("b.JPEG", "JPEG", "L", 1), ("c.jpe", "JPEG", "CMYK", 3), ("d.jfif", "JPEG", "RGB", 3),
    ("a.png", "PNG", "RGB", 0), ("b.png", "PNG", "L", 0), ("c.png", "PNG", "P", 0), ("d.PNG", "PNG", "RGBA", 0), ("e.png", "PNG", "LA", 0),
    ("a.tif", "TIFF", "RGB", 0), ("b.tiff", "TIFF", "CMYK", 0), ("c.tif", "TIFF", "L", 0), ("d.tif", "TIFF", "RGBA", 0),
    ("a.bmp", "BMP", "RGB", 0), ("a.gif", "GIF", "P", 0), ("a.webp", "WEBP", "RGB", 3), ("b.webp", "WEBP", "RGBA", 3),
    ("a.ppm", "PPM", "RGB", 0), ("a.pgm", "PPM", "L", 0), ("a.tga", "TGA", "RGB", 0), ("a.ico", "ICO", "RGBA", 0), ("a.pcx", "PCX", "RGB", 0),
    ("a.jp2", "JPEG2000", "RGB", 0), ("b.j2k", "JPEG2000", "L", 0), ("a.avif", "AVIF", "RGB", 4),
]


@pytest.mark.parametrize("name, kind, mode, error", ZOO)
def test_zoo_is_read_rightly_with_others_beside_it(name, kind, mode, error, tmp_path):
    Image.init()
    if kind not in Image.SAVE: pytest.skip(f"this Pillow cannot write {kind}")
    Image.new("RGB", (32, 32), COLOUR).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path/name, format=kind)
    images = FolderImages(tmp_path, size=16)
    assert [path.name for path in images.files] == [name]
    expected = torch.tensor([GREY]*3 if mode in ("L", "LA") else COLOUR).view(3, 1, 1)
    assert (images.pixels(0).int() - expected).abs().max() <= error
    if error == 0: assert load_image(tmp_path/name).equal((expected/255).expand(3, 32, 32))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5000, 1), (31, 32)])
@pytest.mark.parametrize("mode", ["1", "L", "RGBA", "I;16"])
def test_zoo_of_sizes(size, mode, tmp_path):
    Image.new(mode, size, {"1": 1, "RGBA": (255, 255, 255, 255), "I;16": 65535}.get(mode, 255)).save(tmp_path/"a.png")
    assert FolderImages(tmp_path, size=8)[0].equal(torch.ones(3, 8, 8))
    assert load_image(tmp_path/"a.png").shape == (3, size[1], size[0])


def test_zoo_of_depths_and_transparency(tmp_path):
    grey = np.array([[0, 40000, 65535]], np.uint16)                                        # 40000/257 = 155.6
    Image.fromarray(grey).save(tmp_path/"deep.png")
    Image.fromarray(grey).save(tmp_path/"deep.tif")
    Image.fromarray(grey).save(tmp_path/"clear.png", transparency=40000)
    for name, values in (("deep.png", [0, 156, 255]), ("deep.tif", [0, 156, 255]), ("clear.png", [0, 255, 255])):
        assert read_rgb(tmp_path/name).getchannel(1).tobytes() == bytes(values), name
    row = b"\0" + struct.pack(">6H", 0, 0, 65535, 0, 40000, 0)                             # blue, then some green
    (tmp_path/"colours.png").write_bytes(png(2, 1, 16, 2, row))
    assert [read_rgb(tmp_path/"colours.png").getpixel((i, 0)) for i in (0, 1)] == [(0, 0, 255), (0, 156, 0)]
    (tmp_path/"colours.png").write_bytes(png(2, 1, 16, 2, row, transparent(0, 40000, 0)))
    assert [read_rgb(tmp_path/"colours.png").getpixel((i, 0)) for i in (0, 1)] == [(0, 0, 255), (255, 255, 255)]
    palette = Image.new("P", (2, 1)); palette.putpalette([9, 8, 7, 6, 5, 4]); palette.putpixel((1, 0), 1)
    palette.save(tmp_path/"palette.png", transparency=1)
    palette.save(tmp_path/"palette.gif", transparency=1)
    for name in ("palette.png", "palette.gif"):
        assert [read_rgb(tmp_path/name).getpixel((i, 0)) for i in (0, 1)] == [(9, 8, 7), (255, 255, 255)]


@pytest.mark.parametrize("notes", ["", "broken resolution", "no notes at all"])
def test_a_turned_photograph_is_upright_whatever_else_its_notes_say(notes, tmp_path):
    stored = Image.new("RGB", (64, 32), "white")                                           # turned: white above, black below
    stored.paste("black", (0, 0, 32, 32))
    resolution = (-1, 0) if notes == "broken resolution" else (72, 1)
    exif = (b"Exif\0\0II*\0" + struct.pack("<IHHHIHHHHII", 8, 2, 0x0112, 3, 1, 8, 0, 0x011A, 5, 1, 38) + struct.pack("<Iii", 0, *resolution))
    if notes == "no notes at all": exif = b"Exif\0\0" + b"\xff"*40
    stored.save(tmp_path/"a.jpg", exif=exif, quality=95)
    image = read_rgb(tmp_path/"a.jpg")
    if notes == "no notes at all": assert image.size == (64, 32) and image.getpixel((60, 16))[0] > 250
    else: assert image.size == (32, 64) and image.getpixel((16, 4))[0] > 250 and image.getpixel((16, 60))[0] < 5


def test_zoo_that_is_refused_by_name(tmp_path):
    values = np.zeros((4, 4), np.float32); values[2, 2] = np.nan
    Image.fromarray(values).save(tmp_path/"nan.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path/"wide.tif")
    (tmp_path/"bomb.png").write_bytes(png(30_000, 30_000, 1, 0, b"\0"))                     # 900 million pixels, it says
    (tmp_path/"liar.png").write_bytes(png(4000, 4000, 8, 0, b"\0" * 100))                   # pixels are missing
    (tmp_path/"empty.jpg").write_bytes(b"")
    (tmp_path/"text.webp").write_text("no picture")
    (tmp_path/"page.jpg").write_text("<html>404</html>")
    (tmp_path/"gone.jpg").symlink_to(tmp_path/"nowhere.jpg")
    names = {"nan.tif": "32-bit floats", "wide.tif": "32-bit integers", "bomb.png": "bomb", "liar.png": "", "empty.jpg": "", "text.webp": "",
             "page.jpg": "", "gone.jpg": ""}
    for name, why in names.items():
        with pytest.raises(OSError, match=f"{name}(?s:.*){why}"): read_rgb(tmp_path/name)
    images = FolderImages(tmp_path, size=8)
    assert [path.name for path in images.files] == sorted(names)
    with pytest.raises(ValueError, match="none of the 8 images"): FolderImages(tmp_path, size=8, on_error="skip")
    Image.new("RGB", (8, 8), "white").save(tmp_path/"good.png")
    images = FolderImages(tmp_path, size=8, on_error="skip")
    assert [path.name for path in images.files] == ["good.png"] and [path.name for path in images.skipped] == sorted(names)
    assert images.label.endswith("8 unreadable left out") and images[0].equal(torch.ones(3, 8, 8))


KEEPS = {"png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "tif": ("1", "L", "RGB", "RGBA", "CMYK", "I;16"), "webp": ("RGB", "RGBA"),
         "bmp": ("1", "L", "RGB"), "gif": ("L", "P"), "ppm": ("1", "L", "RGB"), "tga": ("L", "RGB", "RGBA"), "jp2": ("L", "RGB")}  # without loss
TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
          7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}         # how a viewer shows each EXIF orientation


def drawn(mode, shape, rng):
    """A picture of a mode, and what is seen of it as RGB over white, by the definitions of the modes."""
    v = rng.integers(0, 256, (*shape, 4)).astype(np.uint8)
    grey = v[..., :1].repeat(3, 2)
    if mode == "1": return Image.fromarray(v[..., 0]).point(lambda g: 255*(g > 127), "1"), 255*(grey > 127)
    if mode == "L": return Image.fromarray(v[..., 0]), grey
    if mode == "I;16":
        deep = v[..., 0].astype(np.uint16)*256 + v[..., 1]
        return Image.fromarray(deep), np.round(deep/257)[..., None].repeat(3, 2)
    if mode == "P":
        image, palette = Image.fromarray(v[..., 0]).convert("P"), rng.integers(0, 256, (256, 3)).astype(np.uint8)
        image.putpalette(palette.tobytes())
        return image, palette[np.asarray(image)]
    if mode == "RGB": return Image.fromarray(v[..., :3].copy()), v[..., :3]
    if mode == "CMYK": return Image.fromarray(v, "CMYK"), (255.0 - v[..., :3])*(255.0 - v[..., 3:])/255
    colour, alpha = (grey, v[..., 1:2]/255) if mode == "LA" else (v[..., :3], v[..., 3:]/255)
    return Image.fromarray(v[..., :2].copy() if mode == "LA" else v, mode), alpha*colour + (1 - alpha)*255


def test_zoo_of_drawn_pictures(record, tmp_path):
    """A picture of any format, mode, size and orientation is read rightly; damaged, it is read or refused by name."""
    rng = np.random.default_rng(0)
    for _ in record.upto(60, 2000):
        suffix = list(KEEPS)[rng.integers(len(KEEPS))]
        mode, shape = KEEPS[suffix][rng.integers(len(KEEPS[suffix]))], tuple(rng.integers(1, 40, 2))
        image, seen = drawn(mode, shape, rng)
        file, options = tmp_path/f"picture.{suffix}", dict(lossless=True, exact=True) if suffix == "webp" else {}
        if suffix in ("png", "webp"):
            turn = int(rng.integers(1, 9))
            exif = Image.Exif()
            exif[0x0112], seen, options["exif"] = turn, TURNED[turn](seen), exif
        image.save(file, **options)
        with record.case():
            read = np.asarray(read_rgb(file)).astype(float)
            assert read.shape == seen.shape and np.abs(read - seen).max() <= 1, (suffix, mode, shape)
        data = bytearray(file.read_bytes())
        start = int(rng.integers(len(data)))
        data[start:start + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(9)))
        file.write_bytes(data)
        with record.case():
            try: assert read_rgb(file).mode == "RGB"
            except OSError as error: assert str(file) in str(error)


def test_training_goes_on_without_what_cannot_be_read(folder, tmp_path):
    for path in folder.iterdir(): (tmp_path/path.name).write_bytes(path.read_bytes())
    (tmp_path/"07.png").write_bytes(b"")
    whole, damaged = get_dataset("folder", "all", folder, 32), get_dataset("folder", "all", tmp_path, 32, on_error="skip")
    assert [path.name for path in damaged.skipped] == ["07.png"] and len(damaged) == 11
    assert damaged.batch(range(11)).equal(whole.batch([i for i in range(12) if i != 7]))   # the others as they were
    loader, _ = make_loaders(damaged, damaged, batch_size=4, num_workers=1)
    assert [len(batch) for batch in loader] == [4, 4]
    with pytest.raises(OSError, match="07.png"): list(get_dataset("folder", "all", tmp_path, 32))


def test_a_linked_folder_is_followed_once_and_never_renames(tmp_path):
    write(tmp_path/"set", ["b/1.png", "c/2.png", "album.jpg/3.png"])
    write(tmp_path/"far", ["4.png", "deep/5.png"])
    def names(): return [path.relative_to(tmp_path/"set").as_posix() for path in image_files(tmp_path/"set")]
    before = names()
    for link, goal in (("a", "set/c"), ("c/up", "set"), ("far", "far"), ("far too", "far"), ("x", "far/deep")):
        (tmp_path/"set"/link).symlink_to(tmp_path/goal)
    (tmp_path/"far"/"round").symlink_to(tmp_path)
    assert before == ["album.jpg/3.png", "b/1.png", "c/2.png"] and names() == before + ["far/4.png", "far/deep/5.png"]
    write(tmp_path/"far", [".hidden/6.png"])
    assert names() == before + ["far/4.png", "far/deep/5.png"]
