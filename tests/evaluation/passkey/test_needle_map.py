"""The heat map of needles."""

from matplotlib.image import imread

from evaluation.passkey.figure import save_needle_map


def test_a_map_of_one_length_is_wide_enough_for_its_title(tmp_path):
    row = {"model": "drt", "length": 1024, "exact_match": 1.0, "by_depth": [{"depth": 0.5, "exact_match": 1.0}]}
    widths = {}
    for title in ("Needle", "Needle (multihop): exact match of the answer"):
        save_needle_map([row], tmp_path / "map.png", title=title)
        widths[title] = imread(tmp_path / "map.png")
    (short, long) = widths.values()
    assert long.shape[1] > 150 * 0.08 * 44 > short.shape[1]  # 0.08 inches a letter
    assert (long[:30, :10, :3] == 1).all() and (long[:30, -10:, :3] == 1).all()  # the title is not cut off
