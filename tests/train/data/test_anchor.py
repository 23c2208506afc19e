"""One anchor set for all peers: the same bytes from the same input, and nobody trains with another one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import noise, real_data, write_folders, write_png, write_table

from hsl_node.errors import DataError, FederationMismatch
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data import anchor

CLASSES = ("normal", "opacity")


def built(root: Path, n: int | None = 5, seed: int = 1, size: int = 16) -> anchor.AnchorSet:
    return anchor.build(DataConfig(path=root), name="test", classes=CLASSES, image_size=size, n=n, seed=seed)


def test_the_set_holds_n_of_each_class(tmp_path: Path) -> None:
    result = built(write_folders(tmp_path / "d", {"normal": 9, "opacity": 7, "other": 4}))
    assert result.images.shape == (10, 16, 16) and result.images.dtype == np.uint8
    assert Counter(result.labels.tolist()) == {0: 5, 1: 5}


@pytest.mark.parametrize("mark", ["\x1b[2J", "\x9b2J", "\n", "\u202e"])
def test_threat_20_what_cannot_be_printed_stands_in_no_name_of_an_anchor_set(tmp_path: Path, mark: str) -> None:
    made = built(write_folders(tmp_path / "d", {"normal": 5, "opacity": 5}))
    for wrong in (replace(made, name=f"x{mark}"), replace(made, classes=("normal", f"opacity{mark}"))):
        anchor.save(wrong, tmp_path / "a")
        with pytest.raises(DataError, match="cannot be printed"):
            anchor.load(tmp_path / "a")
    data = DataConfig(path=tmp_path / "d")
    with pytest.raises(DataError, match="cannot be printed"):
        anchor.build(data, name=f"x{mark}", classes=CLASSES, image_size=16, n=5)


def test_without_n_it_takes_as_many_as_the_rarer_class_has(tmp_path: Path) -> None:
    result = built(write_folders(tmp_path / "d", {"normal": 9, "opacity": 7}), n=None)
    assert Counter(result.labels.tolist()) == {0: 7, 1: 7}


def test_file_names_and_order_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    write_folders(tmp_path / "a", {"normal": 8, "opacity": 8})
    for path in (tmp_path / "a").rglob("*.png"):  # the same images, under names in another order
        other = tmp_path / "b" / path.parent.name / f"{999 - int(path.stem)}.png"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())
    first = anchor.save(built(tmp_path / "a"), tmp_path / "1")
    assert anchor.save(built(tmp_path / "b"), tmp_path / "2") == first == anchor.fingerprint(tmp_path / "1")
    assert anchor.save(built(tmp_path / "a", seed=2), tmp_path / "3") != first


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    made = built(write_folders(tmp_path / "d", {"normal": 8, "opacity": 8}))
    digest = anchor.save(made, tmp_path / "anchor.safetensors")
    read = anchor.load(tmp_path / "anchor.safetensors", digest)
    assert (read.name, read.classes) == (made.name, made.classes)
    np.testing.assert_array_equal(read.images, made.images)
    np.testing.assert_array_equal(read.labels, made.labels)
    assert read.labels.dtype == np.int64 and not read.images.flags.writeable


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    """Others can read it with the format's own library."""
    from safetensors.numpy import load_file

    made = built(write_folders(tmp_path / "d", {"normal": 8, "opacity": 8}))
    anchor.save(made, tmp_path / "anchor.safetensors")
    tensors = load_file(tmp_path / "anchor.safetensors")
    np.testing.assert_array_equal(tensors["images"], made.images)


def test_colour_images_make_a_colour_set(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"normal": 3, "opacity": 2})
    write_png(root / "opacity/c.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert built(root, n=3).images.shape == (6, 16, 16, 3)


def test_an_image_filed_twice_counts_once_and_one_with_both_labels_never(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"normal": 5, "opacity": 5})
    (root / "normal/again.png").write_bytes((root / "normal/000.png").read_bytes())
    (root / "opacity/both.png").write_bytes((root / "normal/001.png").read_bytes())
    with pytest.raises(DataError, match="there are 4 'normal' and 5 'opacity'"):
        built(root, n=5)
    assert Counter(built(root, n=None).labels.tolist()) == {0: 4, 1: 4}


def test_too_few_images_name_the_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs 8 different images of each class, there are 9 'normal' and 7") as caught:
        built(write_folders(tmp_path / "d", {"normal": 9, "opacity": 7}), n=8)
    assert "at most 7" in caught.value.remedy


def test_a_misspelt_class_is_named_with_the_labels_that_there_are_and_those_of_the_same_letters(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image is labelled 'opacity'\n") as told:
        built(write_folders(tmp_path / "d", {"normal": 9, "opacities": 7}))
    assert "--classes: normal, opacities" in told.value.remedy
    with pytest.raises(DataError, match="no image is labelled 'opacity'; did you mean 'Opacity'"):
        built(write_folders(tmp_path / "e", {"normal": 9, "Opacity": 7}))


def test_an_unreadable_chosen_image_is_an_error_by_line(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": CLASSES[n % 2]} for n in range(6)]
    path = write_table(tmp_path / "d/t.csv", rows)
    (tmp_path / "d/2.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"t\.csv:4: ") as caught:
        built(path, n=3)
    assert "2.png" not in str(caught.value)


# ---------------------------------------------------------------- the file that arrives


def test_another_file_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"normal": 8, "opacity": 8})
    ours = anchor.save(built(root, seed=1), tmp_path / "ours")
    theirs = anchor.save(built(root, seed=2), tmp_path / "theirs")
    with pytest.raises(FederationMismatch, match=f"(?s){ours}.*{theirs}") as caught:
        anchor.load(tmp_path / "ours", theirs)
    assert caught.value.exit_code == 17 and caught.value.remedy


def test_one_changed_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    digest = anchor.save(built(write_folders(tmp_path / "d", {"normal": 8, "opacity": 8})), tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    content[-40] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FederationMismatch):
        anchor.load(tmp_path / "a", digest)


def test_the_federations_card_is_verified(tmp_path: Path) -> None:
    anchor.save(built(write_folders(tmp_path / "d", {"normal": 8, "opacity": 8})), tmp_path / "a")
    card = anchor.card_of(tmp_path / "a")
    assert (card.images, card.image_size, card.name) == (10, 16, "test")
    assert len(anchor.verify(tmp_path / "a", card).labels) == 10
    with pytest.raises(FederationMismatch, match=r"10 images of 16 px.*says 12 of 16 px"):
        anchor.verify(tmp_path / "a", card.model_copy(update={"images": 12}))


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"])
def test_what_is_no_anchor_file_is_named_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="is not an anchor set"):
        anchor.load(tmp_path / "a")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    anchor.save(built(write_folders(tmp_path / "d", {"normal": 8, "opacity": 8})), tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(DataError, match="is not an anchor set"):
        anchor.load(tmp_path / "a")


def test_a_missing_file_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        anchor.load(tmp_path / "none", "0" * 64)
    assert "node.toml" in caught.value.remedy


# ---------------------------------------------------------------- sets at hand


def test_the_stand_in_is_named_so_and_always_the_same(tmp_path: Path) -> None:
    digits = anchor.digits_standin(24)
    assert "stand-in" in digits.name and "not medical" in digits.name
    assert Counter(digits.labels.tolist()) == {0: 174, 1: 174}, "174 scans of the digit 8 are bundled, 183 of the 3"
    assert anchor.save(digits, tmp_path / "a") == anchor.save(anchor.digits_standin(24), tmp_path / "b")
    assert anchor.digits_standin(24, n=20).images.shape == (40, 24, 24)


def test_the_stand_in_can_be_learned() -> None:
    """The nearest class mean tells a 3 from an 8: the labels belong to the pictures."""
    digits = anchor.digits_standin(16)
    flat = digits.images.reshape(len(digits.labels), -1).astype(float)
    half = len(flat) // 2
    means = [flat[:half][digits.labels[:half] == c].mean(axis=0) for c in (0, 1)]
    guess = np.argmin([((flat[half:] - m) ** 2).sum(axis=1) for m in means], axis=0)
    assert (guess == digits.labels[half:]).mean() > 0.85


def test_two_classes_of_cifar10(tmp_path: Path) -> None:
    path = real_data("cifar10") / "cifar10_subset.npz"
    made = anchor.build(DataConfig(path=path), name="CIFAR-10", classes=("cat", "ship"), image_size=16, n=500)
    assert made.images.shape == (1000, 16, 16, 3)


def test_chest_films(tmp_path: Path) -> None:
    data = DataConfig(path=real_data("cxr_pneumonia") / "metadata.csv", columns={"path": "file", "label": "class"})
    made = anchor.build(data, name="CXR", classes=("normal", "pneumonia"), image_size=16, n=1000)
    assert made.images.shape == (2000, 16, 16)
    with pytest.raises(DataError, match="1571 'normal' and 1727 'pneumonia'"):
        anchor.build(data, name="CXR", classes=("normal", "pneumonia"), image_size=16, n=1600)


def test_noise_pictures_of_the_tests_differ() -> None:
    """Else the tests above would test one picture."""
    assert len({noise(n).tobytes() for n in range(50)}) == 50
