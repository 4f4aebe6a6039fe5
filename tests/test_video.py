"""Videos as files: what is written is what was shown, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imageio_ffmpeg import read_frames
from PIL import Image

from unicp.demo import scenes
from unicp.errors import UnicpError
from unicp.files import video
from unicp.tensors import metrics

SIDE, FRAMES = 48, 9


@pytest.fixture(scope="module")
def drawn() -> Any:
    """A scene, (F, H, W, 3) of floats in [0, 1]."""
    return scenes.render(scenes.sample_scene(4), frames=FRAMES, height=SIDE, width=SIDE)


def decoded(path: Path) -> tuple[Any, dict[str, Any]]:
    """The frames of an mp4 or gif as floats in [0, 1], and what ffmpeg says of it."""
    reader = read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    return np.stack([np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]) / 255, about


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("a.mp4", 34), ("a.gif", 30)])
def test_a_video_reads_back_as_it_was(tmp_path: Path, drawn: Any, name: str, least: float) -> None:
    video.save(drawn, tmp_path / name, fps=10, scale=2)
    frames, about = decoded(tmp_path / name)
    assert frames.shape == (FRAMES, 2 * SIDE, 2 * SIDE, 3)
    assert about["fps"] == pytest.approx(10, abs=0.1)
    assert metrics.psnr(frames, video.enlarge(drawn, 2)) > least
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_mp4_plays_everywhere_and_says_its_colours(tmp_path: Path, drawn: Any) -> None:
    about = decoded(video.save(drawn, tmp_path / "a.mp4", fps=8))[1]
    assert about["codec"] == "h264"
    assert about["pix_fmt"].startswith("yuv420p")
    assert "bt709" in about["pix_fmt"]


def test_an_odd_size_loses_nothing(tmp_path: Path, drawn: Any) -> None:
    video.save(drawn[:, :47, :45], tmp_path / "a.mp4", fps=8, scale=1)
    frames, _ = decoded(tmp_path / "a.mp4")
    assert frames.shape[1:3] == (48, 46)
    assert metrics.psnr(frames[:, :47, :45], drawn[:, :47, :45]) > 30


def test_small_videos_are_enlarged_to_be_seen(tmp_path: Path, drawn: Any) -> None:
    frames, _ = decoded(video.save(drawn, tmp_path / "a.mp4", fps=8))
    assert min(frames.shape[1:3]) == video.MIN_SHOWN_SIDE
    assert video.default_scale(480, 832, ".mp4") == 1


def test_a_png_is_a_strip_of_frames(tmp_path: Path, drawn: Any) -> None:
    video.save(drawn, tmp_path / "a.png", fps=8)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (SIDE, video.STRIP * SIDE, 3)
    expected = video.to_uint8(drawn)
    assert (picture[:, :SIDE] == expected[0]).all()
    assert (picture[:, -SIDE:] == expected[-1]).all()


def test_a_video_of_few_frames_is_a_short_strip(drawn: Any) -> None:
    assert video.strip(drawn[:3]).shape == (1, SIDE, 3 * SIDE, 3)


def test_what_is_not_a_video_is_refused(tmp_path: Path, drawn: Any) -> None:
    with pytest.raises(UnicpError, match="got shape"):
        video.save(drawn[0], tmp_path / "a.mp4", fps=8)
    with pytest.raises(UnicpError, match=r"'\.mp3'; known: \.mp4, \.gif, \.png\. Did you mean '\.mp4'"):
        video.save(drawn, tmp_path / "a.mp3", fps=8)
    assert list(tmp_path.iterdir()) == []


# --- side by side ---------------------------------------------------------------------------------------------------


def test_side_by_side_holds_both_below_their_labels(drawn: Any) -> None:
    both = video.side_by_side(drawn, drawn[::-1], ("unaccelerated 5.2 s", "adacache 2.7 s"))
    header = both.shape[1] - SIDE
    assert both.shape == (FRAMES, SIDE + header, 2 * SIDE + video.GAP, 3)
    assert (both[:, header:, :SIDE] == video.to_uint8(drawn)).all()
    assert (both[:, header:, -SIDE:] == video.to_uint8(drawn[::-1])).all()
    assert both[0, :header, :SIDE].max() > 100  # letters
    assert both[0, :header, -SIDE:].max() > 100


@pytest.mark.parametrize("width", [64, 290, 832])
def test_a_label_fits_its_width(width: int) -> None:
    header = video.labelled(np.zeros((1, 8, width, 3)), "unaccelerated 1234.5 s")[0, :-8]
    assert header[:, 0].max() == 0 and header[:, -1].max() == 0  # nothing is cut off
    assert header.max() > 100


def test_strips_are_put_below_each_other(drawn: Any) -> None:
    both = video.comparison(drawn, drawn, ("a", "b"), ".png")
    assert both.shape[0] == 1
    assert both.shape[2] == video.STRIP * SIDE


def test_videos_of_different_sizes_are_not_put_together(drawn: Any) -> None:
    with pytest.raises(UnicpError, match="differ in shape"):
        video.side_by_side(drawn, drawn[1:], ("a", "b"))


# --- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing(
    tmp_path: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    def half(frames: Any, target: Path, fps: float) -> None:
        target.write_bytes(b"half")
        raise error

    monkeypatch.setitem(video.WRITERS, Path(name).suffix, half)
    with pytest.raises(error):
        video.save(drawn, tmp_path / name, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr(video, "_ffmpeg", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video.save(drawn, path, fps=8)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_ffmpegs_own_words_are_told(tmp_path: Path, drawn: Any) -> None:
    with pytest.raises(RuntimeError, match=r"ffmpeg could not write a\.part: .*Encoder not found"):
        video._ffmpeg(video.to_uint8(drawn), tmp_path / "a.part", 8, ["-c:v", "nosuchcodec", "-f", "mp4"])


def test_folders_are_made_or_named_in_the_error(tmp_path: Path, drawn: Any) -> None:
    assert video.save(drawn, tmp_path / "new" / "deep" / "a.png", fps=8).exists()
    with pytest.raises(UnicpError, match="cannot write"):
        video.save(drawn, tmp_path / "new" / "deep" / "a.png" / "b.png", fps=8)
