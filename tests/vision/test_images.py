"""Images of every odd kind become the RGB that a person sees, or one clear line."""

import io

import numpy as np
import pytest
from PIL import Image

from polymamba.core import InputError
from polymamba.vision.images import ASPECT, bounded, read_image

RAMP = np.linspace(0, 255, 12 * 8).reshape(8, 12)
COLOURS = np.stack((RAMP, RAMP.T.reshape(8, 12), 255 - RAMP), -1).astype(np.uint8)  # (8, 12, 3)


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def refusal(content: bytes, name: str) -> str:
    """What is said of an image that cannot be read; "" if it can."""
    try:
        read_image(content, name)
    except InputError as error:
        return str(error)
    return ""


def pixels(item, name="x") -> np.ndarray:
    image = read_image(item, name)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_colours(form):
    options = {"lossless": True} if form == "WEBP" else {}
    found = pixels(saved(Image.fromarray(COLOURS), form, **options))
    assert np.abs(found.astype(int) - COLOURS).max() <= (60 if form == "GIF" else 0)  # a GIF has 256 colours


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    """Each of the eight ways to store one picture."""
    turned = {
        1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1], 5: COLOURS.swapaxes(0, 1),
        6: np.rot90(COLOURS, 1), 7: np.rot90(COLOURS, 2).swapaxes(0, 1), 8: np.rot90(COLOURS, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(saved(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif)), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_modes(mode):
    """Every mode shows about the same picture."""
    grey = Image.fromarray(RAMP.astype(np.uint8))
    image = Image.fromarray(COLOURS) if mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr", "LAB") else grey
    expected = np.asarray(image.convert("RGB")).astype(int)
    if mode == "I;16":
        image = Image.fromarray((RAMP * 257).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray((RAMP / 255).astype(np.float32))
    elif mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(image, lab)
    else:
        image = image.convert(mode, dither=Image.Dither.NONE) if mode == "1" else image.convert(mode)
    if mode == "1":
        expected = np.asarray(image.convert("RGB")).astype(int)
    found = pixels(saved(image, "TIFF"))
    tolerance = {"P": 60, "YCbCr": 6, "LAB": 30}.get(mode, 2)
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def test_transparency_shows_white():
    clear = np.dstack((COLOURS, np.zeros((8, 12), np.uint8)))
    assert (pixels(saved(Image.fromarray(clear), "PNG")) == 255).all()
    half = np.dstack((np.zeros_like(COLOURS), np.full((8, 12), 128, np.uint8)))
    assert np.abs(pixels(saved(Image.fromarray(half), "PNG")).astype(int) - 127).max() <= 1
    palette = Image.new("P", (4, 4))
    assert (pixels(saved(palette, "PNG", transparency=0)) == 255).all()


def test_sixteen_bits_of_a_png():
    image = Image.fromarray((RAMP * 257).astype(np.uint16))
    assert np.abs(pixels(saved(image, "PNG"))[..., 0].astype(float) - RAMP).max() <= 1


@pytest.mark.parametrize(
    "array",
    [
        COLOURS,
        COLOURS[..., :1],
        COLOURS[..., 0],
        COLOURS.transpose(2, 0, 1),
        COLOURS.astype(np.int64),
        (COLOURS / 255).astype(np.float32),
        (COLOURS[..., 0] * np.uint16(257)).astype(np.uint16),
    ],
)
def test_arrays(array):
    found = pixels(array)
    expected = COLOURS if array.ndim == 3 and 1 not in array.shape else COLOURS[..., :1]
    assert np.array_equal(found, np.broadcast_to(expected, (8, 12, 3)))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3, 4, 5)), r"\(2, 3, 4, 5\)"),
        (np.zeros((0, 5), np.uint8), r"\(0, 5\)"),
        (np.full((4, 4), 7.0), "between 0 and 1"),
        (np.full((4, 4), np.nan), "between 0 and 1"),
        (np.full((4, 4), 300), "between 0 and 255"),
    ],
)
def test_arrays_that_are_no_images(array, words):
    with pytest.raises(InputError, match=f"^x: .*{words}"):
        read_image(array, "x")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_cut_short_anywhere(form):
    """An error that names the file, or, where the format allows it, an image; nothing else."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    whole = saved(Image.fromarray(noise), form)
    said = [refusal(whole[:length], "cut.x") for length in range(0, len(whole) - 1, max(1, len(whole) // 40))]
    said = [words for words in said if words]
    assert len(said) > 20
    assert all(words.startswith("cut.x: ") and "\n" not in words for words in said)


def test_damaged_anywhere():
    rng = np.random.default_rng(1)
    for form in ("JPEG", "PNG", "GIF", "TIFF", "WEBP"):
        whole = bytearray(saved(Image.fromarray(COLOURS), form))
        for _ in range(60):
            spoiled = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                spoiled[place] = rng.integers(256)
            assert "\n" not in refusal(bytes(spoiled), "bad.x")  # and nothing else is raised


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: "):
        read_image(tmp_path / "a.png", str(tmp_path / "a.png"))
    with pytest.raises(InputError, match=r"b\.png: no such file"):
        read_image(tmp_path / "b.png", str(tmp_path / "b.png"))
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path, "folder")


def test_huge(tmp_path):
    """100 million pixels are read; a JPEG at a smaller scale; more than Pillow takes for honest are refused."""
    Image.new("1", (20_000, 5_000)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "a").size == (20_000, 5_000)
    Image.new("L", (4000, 3000), 90).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg", "a", enough=100)
    assert 100 <= min(image.size) < 1000
    assert image.getpixel((5, 5)) == (90, 90, 90)
    Image.new("1", (40_000, 10_000)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="more than 178,956,970 pixels"):
        read_image(tmp_path / "b.png", "b")


@pytest.mark.parametrize("size", [(1, 1), (500, 1), (1, 500), (16, 2), (17, 2), (2000, 3)])
def test_strips_are_cut_to_their_middle(size):
    image = Image.new("RGB", size)
    image.putpixel((size[0] // 2, size[1] // 2), (9, 9, 9))
    cut = bounded(image)
    assert max(cut.size) <= ASPECT * min(cut.size)
    assert min(cut.size) == min(size)
    assert cut.size == size or max(cut.size) == ASPECT * min(size)
    assert (9, 9, 9) in set(cut.get_flattened_data() if hasattr(cut, "get_flattened_data") else cut.getdata())
