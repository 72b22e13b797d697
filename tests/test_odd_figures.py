"""Figures of odd cases: one epoch, many classes, long names, 0 and 100 %, seeds that stop apart."""

import copy

import pytest
from conftest import made_record

import ex3_convnet
import utils

LONG = ["holiday photos of 2019 to 2024, sorted by Grandmother, second copy (do not delete), all "
        "cameras, all trips, and the garden", "W" * 200, "Ferienfotosammlungsordner-" * 8,
        "mathtext $_{costs} extra\\frac " * 5]


@pytest.fixture
def figures(folder, monkeypatch):
    """A list that grows by each figure that is saved."""
    found, save = [], utils.save_figure

    def watch(figure, path, show=False):
        save(figure, path, show)
        figure.set_dpi(150)  # that of the file, by which texts are measured
        found.append(figure)

    monkeypatch.setattr(utils, "save_figure", watch)
    return found


def draw_all(path, data="photos", **options):
    """Every figure there is, of records with these options."""
    def records(*seeds, **more):
        return [made_record(seed, data=data, **options, **more) for seed in seeds]

    title = "ConvNet, batch norm, dropout 0.25, rotation+color_jitter+horizontal_flip+resize_crop"
    utils.plot_learning_curves(records(0), title, path)
    utils.plot_filters(records(0, title=title)[0], path)
    utils.plot_classes(records(0, title=title)[0], path)
    utils.plot_class_differences(records(0), records(1), "With batch norm against without", path)
    ex3_convnet.plot_early_stopping({"with batch norm": records(0), "without": records(1)}, path)
    ex3_convnet.plot_techniques({"rotation": records(0), "greyscale": records(0)}, path)
    ex3_convnet.plot_dropout({f"dropout 0.{i}": records(0, run_flags={"dropout": i / 10})
                              for i in range(1, 5)}, path)


def overlaps(labels):
    """Of texts in a row, those that overlap the next one."""
    boxes = [label.get_window_extent() for label in labels]
    return [label.get_text() for label, box, after in zip(labels, boxes, boxes[1:])
            if box.overlaps(after)]


# ------------------------------------------- epochs -------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 50])
def test_the_ticks_of_epochs_are_whole_numbers(figures, folder, epochs):
    utils.plot_learning_curves([made_record(epochs=epochs)], "ConvNet", folder / "curves.png")
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks == [int(tick) for tick in ticks]
        assert len(ticks) >= min(epochs, 3)
        assert [label.get_text() for tick, label in zip(axis.get_xticks(), axis.get_xticklabels())
                if tick in ticks] == [str(int(tick)) for tick in ticks]


def test_five_seeds_that_stop_apart_have_each_stop_once_in_the_legend(figures, folder):
    records = [made_record(seed, epochs=epochs, best=epochs - 10)
               for seed, epochs in enumerate((23, 31, 23, 40, 27))]
    ex3_convnet.plot_early_stopping({"with batch norm": records}, folder / "stops.png")
    axis, = figures[0].axes
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["train", "validation", "± standard deviation of the seeds",
                     "seeds that went on, one by one", "best model: epoch 13, 17, 21, 30",
                     "stop: epoch 23, 27, 31, 40"]
    mean, *rest = (list(line.get_xdata()) for line in axis.lines[4:8])
    assert mean == list(range(1, 24))  # where the first seed stopped
    assert rest == [list(range(23, end + 1)) for end in (31, 40, 27)]


# ------------------------------------------- classes -------------------------------------------


@pytest.mark.parametrize("count", [2, 10, 15, 16, 30])
@pytest.mark.parametrize("name", ["{}", "class number {} of the album"])
def test_up_to_30_classes_are_all_named_and_stand_beside_their_row(figures, folder, count, name):
    names = [name.format(i) for i in range(count)]
    utils.plot_classes(made_record(classes=names), folder / "classes.png")
    matrix, accuracies = figures[0].axes
    assert matrix.get_ylim() == accuracies.get_ylim() == (count - 0.5, -0.5)
    shown = [text[:24] + "…" * (len(text) > 24) for text in names]
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels(),
                   accuracies.get_yticklabels()):
        assert [label.get_text() for label in labels] == shown
        assert overlaps(labels) == []


def test_of_200_classes_the_30_weakest_are_named(figures, folder):
    names = [f"n{i:08}" for i in range(200)]
    record = made_record(classes=names)
    utils.plot_classes(record, folder / "classes.png")
    matrix, accuracies = figures[0].axes
    assert matrix.get_xticklabels() == matrix.get_yticklabels() == []
    labels = accuracies.get_yticklabels()
    assert "the 30 weakest classes" in accuracies.get_title()
    assert (len(labels), overlaps(labels)) == (30, [])
    right = dict.fromkeys(names, 0)
    for label, predicted in zip(utils.unpack(record["labels"]["test"]),
                                utils.unpack(record["predictions"]["reported"]["test"])):
        right[names[label]] += label == predicted
    found = [right[label.get_text()] for label in labels]
    assert found == sorted(right.values())[:30]
    assert accuracies.lines[0].get_xdata().tolist() == pytest.approx([5 * n for n in found])


def test_of_200_classes_the_30_that_differ_most_are_named(figures, folder):
    one, other = ([made_record(seed, classes=[f"n{i:08}" for i in range(200)])]
                  for seed in range(2))
    utils.plot_class_differences(one, other, "One against the other", folder / "classes.png")
    axis, = figures[0].axes
    assert "the 30 largest differences" in figures[0].get_suptitle()
    assert (len(axis.get_yticks()), overlaps(axis.get_yticklabels())) == (30, [])
    sizes = abs(axis.lines[0].get_xdata())
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[-1] > 0


# -------------------------------------------- titles --------------------------------------------


@pytest.mark.parametrize("name", LONG, ids=["words", "no spaces", "hyphens", "signs"])
def test_the_long_name_of_a_folder_is_in_every_title_and_never_cut_off(figures, folder, few, name):
    draw_all(folder / "long.png", data=name)
    data = copy.copy(few)
    data.name = name
    ex3_convnet.plot_augmented_images(data, folder / "long.png")
    assert len(figures) == 8
    for figure in figures:
        assert "".join(name.split()) in "".join(figure.get_suptitle().split())
        box = figure._suptitle.get_window_extent()
        assert 0 < box.x0 < box.x1 < figure.bbox.width
        assert box.y1 < figure.bbox.height
        for axis in figure.axes:  # there is room for something below the title
            assert axis.get_window_extent().y1 < box.y0


def test_a_short_title_stays_on_its_lines(figures, folder):
    utils.plot_learning_curves([made_record()], "ConvNet", folder / "curves.png")
    assert figures[0].get_suptitle() == ("ConvNet: learning curves\nphotos, 900 training images, "
                                         "seed 0")


# ----------------------------------------- 0 and 100 % -----------------------------------------


@pytest.mark.parametrize("share", [0, 1])
def test_no_point_of_0_or_100_percent_is_on_the_edge_of_its_axis(figures, folder, share):
    draw_all(folder / "edges.png", share=share)
    points = 0
    for axis in (axis for figure in figures for axis in figure.axes):
        for along, (low, high), values in (
                (axis.get_xlabel(), axis.get_xlim(), lambda line: line.get_xdata()),
                (axis.get_ylabel(), axis.get_ylim(), lambda line: line.get_ydata())):
            if "accuracy (%)" in along:
                found = [value for line in axis.lines for value in values(line)
                         if line.get_linestyle() != "None" or line.get_marker() == "o"]
                assert all(low < value < high for value in found if value in (0, 100))
                points += found.count(100 * share)
    assert points > 30
