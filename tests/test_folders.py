"""Folders as people have them: which are parts, which are classes, what is left out and named."""

import pytest
from test_data import noise, save

import data
from runtime.commandline import InputError


def lay(root, *names: str):
    """Write a small image for each name; a name that is no image's gets a text."""
    for number, name in enumerate(names):
        file = root / name
        if data.is_image(file):
            save(file, noise(number))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("no image")
    return root


def read(root, *names: str) -> tuple:
    return data.open_images(str(lay(root, *names)))


CLASSES = ("{0}/cat/1.png", "{0}/dog/2.png")


def part(folder: str) -> list[str]:
    return [name.format(folder) for name in CLASSES]


PAIRS = [
    ("train", "valid"), ("train", "validation"), ("train", "dev"), ("Train", "Test"),
    ("TRAIN", "VAL"), ("training", "testing"), ("train", "eval"), ("training_set", "test_set"),
    ("train2017", "val2017"), ("seg_train", "seg_test"), ("trainval", "test"), ("train", "Testing"),
    ("Training Images", "Validation Images"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_parts_of_any_usual_name_are_parts_and_no_classes(first, second, tmp_path):
    train, test = read(tmp_path, *part(first), *part(second))
    assert train.classes == test.classes == ["cat", "dog"] and len(train) == len(test) == 2
    assert all(file.parts[-3] == first for file in train.source), "test images are trained on"
    assert not train.notes


def test_of_three_parts_val_is_tested_on_and_a_line_says_what_is_left_out(tmp_path):
    train, test = read(tmp_path, *part("train"), *part("test"), *part("val"))
    assert len(train) == 2 and {file.parts[-3] for file in test.source} == {"val"}
    (note,) = train.notes
    assert "test images in val; left out: test" in note


def test_parts_are_found_deeper_and_beside_folders_without_images(tmp_path):
    names = [*part("dataset/Data/train"), *part("dataset/Data/val"), "dataset/Annotations/a.xml"]
    train, test = read(tmp_path, *names)
    assert len(train) == len(test) == 2 and train.classes == ["cat", "dog"]
    assert any("no images in" in note and "Annotations" in note for note in train.notes)
    assert any("not read: 1 .xml" in note for note in train.notes)


def test_train_beside_a_folder_without_images_keeps_its_labels(tmp_path):
    train, test = read(tmp_path, *part("train"), "annotations/a.txt", "val/readme.txt")
    assert train.classes == ["cat", "dog"] and test is None
    assert any("annotations, val" in note for note in train.notes)


MAY_BE_EITHER = {
    "train beside images": [*part("train"), *part("images")],
    "train with folders beside a flat folder": [*part("train"), "images/3.png"],
    "two unknown parts": [*part("first"), *part("second")],
    "three, one with a class more": [*part("a"), *part("b"), *part("c"), "c/bird/1.png"],
    "parts inside of classes": ["cat/train/1.png", "cat/val/2.png", "dog/train/3.png",
                                "dog/val/4.png"],
    "only test parts": [*part("val"), *part("test")],
    "parts of each class": ["train_cat/1.png", "val_cat/2.png", "train_dog/3.png",
                            "val_dog/4.png"],
    "images beside masks": ["images/1.png", "masks/1.png"],
    "photographs beside labels": ["JPEGImages/1.jpg", "SegmentationClass/1.png", "GT/1.png"],
    "VOC": ["VOC2012/JPEGImages/1.jpg", "VOC2012/SegmentationClass/1.png"],
    "VOC with objects": ["JPEGImages/1.jpg", "SegmentationClass/1.png", "SegmentationObject/1.png"],
    "CUB": ["images/001.Crow/1.jpg", "segmentations/001.Crow/1.png"],
    "flat test parts": ["val/1.png", "test/2.png"],
    "a flat train beside an unknown name": ["train/1.png", "holdout/2.png"],
}  # fmt: skip


@pytest.mark.parametrize("names", MAY_BE_EITHER.values(), ids=MAY_BE_EITHER)
def test_folders_that_may_be_parts_or_classes_are_refused_with_the_fix(names, tmp_path):
    with pytest.raises(
        InputError, match="name parts train and val, or choose one with --data_path"
    ):
        read(tmp_path, *names)


def test_of_images_and_masks_the_line_offers_the_images(tmp_path):
    with pytest.raises(InputError, match=r"choose one with --data_path '\S+/images'"):
        read(tmp_path, "annotations/trimaps/cat.png", "images/cat.jpg")


def test_the_way_out_that_the_line_names_works(tmp_path):
    names = [f"train/{kind}/{year}/1.png" for kind in ("bus", "car") for year in (2019, 2020)]
    assert read(tmp_path, *names)[0].classes == ["bus", "car"]


CLASSES_INDEED = {
    "vehicles": ["train/1.png", "car/2.png", "bus/3.png"],
    "trains and tubes": ["bullet_train/1.png", "test_tube/2.png", "valley/3.png"],
    "one class with folders of its own": ["cat/a/1.png", "cat/b/2.png", "dog/3.png"],
    "labels of a shop": ["label/1.png", "price tag/2.png"],
    "each with one folder of the same name": ["cat/images/1.png", "dog/images/2.png"],
}


@pytest.mark.parametrize("names", CLASSES_INDEED.values(), ids=CLASSES_INDEED)
def test_classes_that_sound_like_parts_are_classes(names, tmp_path):
    train, test = read(tmp_path, *names)
    assert test is None and train.classes == sorted({name.split("/")[0] for name in names})


def test_one_stray_image_turns_no_labels_off_and_is_named(tmp_path):
    train, _ = read(tmp_path, *part("."), "sample sheet.png")
    assert train.labels.tolist() == [0, 1] and train.classes == ["cat", "dog"]
    assert any("sample sheet.png" in note and "left out" in note for note in train.notes)


def test_many_images_beside_folders_are_all_read_without_labels_and_a_line_says_so(tmp_path):
    train, _ = read(tmp_path, *part("."), "1.png", "2.png", "3.png")
    assert train.labels is None and len(train) == 5
    assert train.notes == [f"no labels: 3 images beside the folders cat, dog of {tmp_path}"]


@pytest.mark.parametrize("flat", ["test", "val", "val/images"])
def test_a_flat_test_part_beside_labels_is_left_out_in_words(flat, tmp_path):
    train, test = read(tmp_path, *part("train"), f"{flat}/1.png", f"{flat}/2.png")
    assert test is None and train.classes == ["cat", "dog"]
    folder = tmp_path / flat.split("/")[0]
    assert train.notes == [f"left out: {folder}, which has no class folders"]


def test_an_empty_class_folder_is_named(tmp_path):
    for folder in ("train/bird", "val/dog", "val/.cache"):
        (tmp_path / folder).mkdir(parents=True)
    train, test = read(tmp_path, *part("train"), "val/cat/1.png")
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.notes == [
        f"no images in {tmp_path / 'train'}: bird",
        f"no images in {tmp_path / 'val'}: dog",
        f"no test images of 1 of the 2 classes in {tmp_path / 'val'}: dog",
    ]


@pytest.mark.parametrize("layout", ["absent", "empty", "of other files"])
def test_classes_without_test_images_are_named(layout, tmp_path):
    """All votes for the one class that is tested may be right, and mean nothing."""
    lay(tmp_path, *part("train"), "train/cow/3.png", "val/cat/4.png")
    if layout != "absent":
        (tmp_path / "val/dog").mkdir()
    if layout == "of other files":
        lay(tmp_path, "val/dog/notes.txt")
    train, test = data.open_images(str(tmp_path))
    assert test.classes == train.classes == ["cat", "cow", "dog"] and test.labels.tolist() == [0]
    line = f"no test images of 2 of the 3 classes in {tmp_path / 'val'}: cow, dog"
    assert line in train.notes


def test_files_that_are_not_read_are_counted_by_name(tmp_path):
    others = ["a.dcm", "b.DCM", "dog/labels.csv", "README", "Thumbs.db", ".DS_Store"]
    train, _ = read(tmp_path, *part("."), *others)
    assert len(train) == 2
    assert train.notes == [f"also in {tmp_path}, not read: 2 .dcm, 1 without an extension, 1 .csv"]


def test_a_folder_of_other_files_alone_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match=r"no images in .*; 2 .dcm, 1 .zip are there"):
        read(tmp_path, "a.dcm", "b.dcm", "images.zip")


@pytest.mark.parametrize("output", ["runs/mine", "cat", "."])
def test_a_run_that_writes_among_its_images_does_not_train_on_its_figures(output, tmp_path):
    """When it continued it had two images more, and perhaps a class called runs."""
    before, _ = read(tmp_path, *part("."))
    lay(tmp_path / output, "curves.png", "attention.png", "checkpoint.pth", "log.txt")
    after, _ = data.open_images(str(tmp_path))
    assert after.source == before.source and after.classes == ["cat", "dog"]


def test_a_photograph_may_be_called_attention(tmp_path):
    assert len(read(tmp_path, "attention.png", "curves.png", "log.txt")[0]) == 2


def test_ordinary_layouts_need_no_word(tmp_path):
    assert not read(tmp_path / "flat", "1.png", "2.jpg")[0].notes
    assert not read(tmp_path / "classes", *part("."))[0].notes
    assert not read(tmp_path / "parts", *part("train"), *part("val"))[0].notes


def test_two_parts_may_be_links_to_the_same_folder(tmp_path):
    lay(tmp_path, *part("root/train"))
    (tmp_path / "root/val").symlink_to("train")
    train, test = data.open_images(str(tmp_path / "root"))
    assert len(train) == len(test) == 2


@pytest.mark.parametrize("extension", ["jfif", "JPEG", "dib", "pcx", "apng", "j2k", "sgi", "qoi"])
def test_extensions_that_pillow_writes_are_read(extension, tmp_path):
    train, _ = data.open_images(str(save(tmp_path / f"a.{extension}", noise()).parent))
    assert train[0][0].shape == (3, 7, 11)


def test_an_iphones_images_are_read_where_the_package_is_there(tmp_path):
    pytest.importorskip("pillow_heif")
    save(tmp_path / "IMG_1.HEIC", noise(size=(64, 64)))
    assert data.open_images(str(tmp_path))[0][0][0].shape == (3, 64, 64)
