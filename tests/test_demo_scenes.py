"""The demo model's world: drawn scenes, their captions, and the judge that compares a video with a caption."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from unicp.demo import scenes
from unicp.demo.check import CaptionCheck, check, parse_caption
from unicp.demo.scenes import COLOURS, Scene, Thing
from unicp.errors import UnicpError

CRITERIA = ("colour", "count", "direction", "speed")
FRAMES = 13
OPPOSITE = {
    "still": "left", "left": "right", "right": "left", "up": "down", "down": "up",
    "bouncing": "up", "spinning": "growing", "growing": "shrinking", "shrinking": "spinning",
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Any]]:
    sampled = [scenes.sample_scene(seed, held_out=seed % 2 == 1) for seed in range(120)]
    return [(scene, scenes.render(scene, frames=FRAMES)) for scene in sampled]


def change(scene: Scene, **fields: Any) -> str:
    """The caption of a scene in which the given fields of every thing are others; values are functions of the thing."""
    things = [dataclasses.replace(t, **{name: value(t) for name, value in fields.items()}) for t in scene.things]
    return dataclasses.replace(scene, things=tuple(things)).caption()


def share(checks: list[CaptionCheck], criterion: str) -> float:
    return sum(getattr(result, criterion) for result in checks) / len(checks)


# --- scenes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        {"frames": 5, "height": 96, "width": 96},
        {"frames": 3, "height": 24, "width": 40},
        {"frames": 1, "height": 40, "width": 24},
    ],
)
def test_render_has_the_asked_shape_and_range(size: dict[str, int]) -> None:
    video = scenes.render(scenes.sample_scene(4), **size)
    assert video.shape == (*size.values(), 3)
    assert video.dtype == np.float32
    assert video.min() >= 0
    assert video.max() <= 1


def test_a_seed_draws_the_same_scene_and_the_same_pixels() -> None:
    for seed in (0, 7, 12345):
        first, again = (scenes.sample_scene(seed) for _ in range(2))
        assert first == again
        assert np.array_equal(scenes.render(first, frames=2), scenes.render(again, frames=2))
    assert len({scenes.sample_scene(seed).caption() for seed in range(50)}) > 40


def test_the_uncaptioned_details_follow_from_the_scenes_own_seed() -> None:
    scene = scenes.sample_scene(0)
    other = dataclasses.replace(scene, seed=scene.seed + 1)
    assert other.caption() == scene.caption()
    assert not np.array_equal(scenes.render(other, frames=2), scenes.render(scene, frames=2))


def test_held_out_captions_are_apart_from_training() -> None:
    training = {scenes.sample_scene(seed).caption() for seed in range(400)}
    held_out = {scenes.sample_scene(seed, held_out=True).caption() for seed in range(40)}
    assert not training & held_out
    assert all(map(scenes.is_held_out, held_out))
    assert not any(map(scenes.is_held_out, training))


def test_about_one_caption_in_twenty_is_held_out() -> None:
    thing = Thing(shape="ball", colour="red", motion="left", speed="slow")
    captions = [
        Scene(things=(dataclasses.replace(thing, shape=shape, colour=colour, motion=motion),), tone=tone).caption()
        for shape in scenes.SHAPES for colour in COLOURS for motion in OPPOSITE for tone in scenes.TONES
    ]  # fmt: skip
    assert 0.03 < np.mean([scenes.is_held_out(caption) for caption in captions]) < 0.07


def test_prompts_are_distinct_held_out_and_repeatable() -> None:
    asked = scenes.prompts(20)
    assert len(set(asked)) == 20
    assert all(map(scenes.is_held_out, asked))
    assert asked == scenes.prompts(20)
    assert asked[:5] == scenes.prompts(5)
    assert not set(asked) & set(scenes.prompts(20, seed=1))


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_parse_back_to_what_they_say() -> None:
    for seed in range(400):
        scene = scenes.sample_scene(seed)
        parsed = parse_caption(scene.caption())
        assert parsed.caption() == scene.caption()
        assert (parsed.tone, parsed.texture, parsed.pan) == (scene.tone, scene.texture, scene.pan)
        for got, thing in zip(parsed.things, scene.things, strict=True):
            assert (got.shape, got.colour, got.motion) == (thing.shape, thing.colour, thing.motion)
            assert thing.motion == "still" or got.speed == thing.speed


def test_captions_parse_in_any_case_and_spacing() -> None:
    caption = "An orange  star moving LEFT fast over a dark cloudy background, the camera pans right "
    assert parse_caption(caption).caption() == " ".join(caption.lower().split())


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat playing the piano",
        "a red ball bouncing fast",
        "a red ball moving fast over a gray striped background",
        "a red ball standing still slowly over a gray striped background",
        "a crimson ball bouncing fast over a gray striped background",
        "a red ball bouncing fast over a gray striped background, and more",
        "a red ball bouncing fast and over a gray striped background",
    ],
)
def test_other_wordings_are_one_clear_error(caption: str) -> None:
    with pytest.raises(UnicpError, match="cannot check the caption"):
        parse_caption(caption)


# --- the judge ------------------------------------------------------------------------------------------------------


def test_drawn_videos_have_what_their_captions_say(drawn: list[tuple[Scene, Any]]) -> None:
    checks = [check(video, scene.caption()) for scene, video in drawn]
    for criterion in CRITERIA:
        assert share(checks, criterion) >= 0.97, criterion


def test_blur_and_noise_do_not_confuse_the_judge(drawn: list[tuple[Scene, Any]]) -> None:
    from scipy import ndimage

    rng = np.random.default_rng(0)
    checks = []
    for scene, video in drawn[:60]:
        bad = ndimage.gaussian_filter(video, (0.3, 1.0, 1.0, 0)) + rng.normal(0, 0.03, video.shape)
        checks.append(check(bad.clip(0, 1), scene))
    for criterion in CRITERIA:
        assert share(checks, criterion) >= 0.97, criterion


def test_a_wrong_direction_is_seen(drawn: list[tuple[Scene, Any]]) -> None:
    checks = [check(video, change(scene, motion=lambda t: OPPOSITE[t.motion])) for scene, video in drawn[:40]]
    assert share(checks, "direction") <= 0.1
    assert share(checks, "colour") >= 0.97
    assert share(checks, "count") >= 0.97


def test_a_wrong_speed_is_seen(drawn: list[tuple[Scene, Any]]) -> None:
    flip = {"slow": "fast", "fast": "slow"}
    moving = [(s, v) for s, v in drawn if any(t.motion != "still" for t in s.things)][:40]
    checks = [check(video, change(scene, speed=lambda t: flip[t.speed])) for scene, video in moving]
    assert share(checks, "speed") <= 0.1
    assert share(checks, "direction") >= 0.97


def test_a_wrong_colour_is_seen_and_does_not_make_the_motion_wrong(drawn: list[tuple[Scene, Any]]) -> None:
    names = list(COLOURS)
    following = {name: names[(index + 1) % len(names)] for index, name in enumerate(names)}
    one = [(scene, video) for scene, video in drawn if len(scene.things) == 1][:40]
    checks = [check(video, change(scene, colour=lambda t: following[t.colour])) for scene, video in one]
    assert share(checks, "colour") <= 0.1
    assert share(checks, "direction") >= 0.97
    assert share(checks, "speed") >= 0.97


def test_a_wrong_number_is_seen(drawn: list[tuple[Scene, Any]]) -> None:
    pairs = [(scene, video) for scene, video in drawn if len(scene.things) == 2]
    assert len(pairs) >= 20
    checks = [check(video, dataclasses.replace(scene, things=scene.things[:1])) for scene, video in pairs[:20]]
    assert share(checks, "count") <= 0.1
    assert share(checks, "colour") <= 0.1


def test_two_objects_of_one_colour_are_two() -> None:
    ball = Thing(shape="ball", colour="red", motion="still", speed="slow", x=0.25, y=0.25)
    scene = Scene(things=(ball, dataclasses.replace(ball, x=0.75, y=0.75)))
    result = check(scenes.render(scene, frames=5), dataclasses.replace(scene, things=(ball,)))
    assert result.objects == 2
    assert result.colour
    assert not result.count


@pytest.mark.parametrize("pan", ["left", "right"])
@pytest.mark.parametrize("texture", scenes.TEXTURES)
def test_a_camera_pan_is_no_motion_of_the_object(texture: str, pan: str) -> None:
    star = Thing(shape="star", colour="pink", motion="still", speed="slow")
    result = check(
        scenes.render(Scene(things=(star,), tone="brown", texture=texture, pan=pan), frames=FRAMES),
        Scene(things=(star,)),
    )
    assert result.colour and result.count and result.direction and result.speed


def test_objects_that_cross_keep_their_motions() -> None:
    left = Thing(shape="ball", colour="red", motion="right", speed="fast", y=0.5, radius=0.14)
    right = Thing(shape="square", colour="blue", motion="left", speed="fast", y=0.5, radius=0.14)
    result = check(scenes.render(Scene(things=(left, right)), frames=FRAMES), Scene(things=(left, right)))
    assert [thing.seen and thing.seen.kind for thing in result.things] == ["right", "left"]
    assert result.colour and result.count and result.speed


def test_an_empty_picture_is_wrong_in_everything_but_breaks_nothing() -> None:
    result = check(np.full((FRAMES, 32, 32, 3), 0.5), "a red ball bouncing fast over a gray striped background")
    assert not (result.colour or result.count or result.direction or result.speed)
    assert result.objects == 0


def test_measures_are_those_of_the_scene() -> None:
    def seen(**fields: Any) -> Any:
        scene = Scene(things=(Thing(**{"shape": "square", "colour": "green", "speed": "fast", **fields}),))
        return check(scenes.render(scene, frames=25), scene).things[0].seen

    assert seen(motion="left").travel == pytest.approx((-scenes.TRAVEL["fast"], 0), abs=0.02)
    assert seen(motion="spinning").turns == pytest.approx(scenes.TURNS["fast"], abs=0.03)
    assert seen(motion="bouncing").bounces == pytest.approx(scenes.BOUNCES["fast"], abs=0.2)
    start, end = scenes.GROWTH["fast"]
    assert seen(motion="shrinking").growth == pytest.approx(np.log(start / end), abs=0.06)


@pytest.mark.parametrize("shape", [(4, 32, 32, 3), (17, 32, 32), (17, 3, 32, 32)])
def test_a_video_of_another_shape_is_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnicpError, match="cannot check a video of shape"):
        check(np.zeros(shape), scenes.sample_scene(0))


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UnicpError, match=r"pip install 'unicp\[train\]'"):
        check(np.zeros((5, 32, 32, 3)), scenes.sample_scene(0))
