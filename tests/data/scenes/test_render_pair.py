"""Pairs of views of a built-in scene: correspondence and visibility."""

import math

import cv2
import numpy as np
import pytest

from mtv_jax.data.scenes import layout
from mtv_jax.data.scenes import world as world_lib
from mtv_jax.data.scenes.render import render, render_pair


@pytest.fixture(scope="module")
def pairs():
  return [render_pair(i) for i in range(24)]


def test_pair_begins_with_the_scene(pairs):
  for index, pair in enumerate(pairs[:6]):
    scene = render(index)
    np.testing.assert_array_equal(pair.first.image, scene.image)
    assert pair.first.captions == scene.captions
    assert pair.second.label == scene.label


def test_correspondence_is_the_reprojection(pairs):
  for pair in pairs:
    points = pair.first.points.astype(np.float64)
    moved = points @ pair.rotation.T + pair.translation
    k = pair.second.camera.intrinsics(96).astype(np.float64)
    projected = moved @ k.T
    ahead = projected[..., 2] > 0.1
    expected = projected[..., 1::-1] / np.maximum(projected[..., 2:], 1e-3) / 96
    np.testing.assert_allclose(
      pair.correspondence[ahead], expected[ahead], atol=1e-4
    )
    np.testing.assert_allclose(
      pair.rotation @ pair.rotation.T, np.eye(3), atol=1e-12
    )


def test_correspondence_moves_the_second_view_onto_the_first(pairs):
  errors, unmoved = [], []
  for pair in pairs:
    y, x = np.moveaxis(pair.correspondence * 96 - 0.5, -1, 0)
    moved = cv2.remap(pair.second.image, x, y, cv2.INTER_LINEAR)
    shown = pair.visible
    assert shown.mean() > 0.15
    errors.append(np.mean(cv2.absdiff(moved, pair.first.image)[shown]))
    unmoved.append(
      np.mean(cv2.absdiff(pair.second.image, pair.first.image)[shown])
    )
  # Grey levels of 255, including sensor noise and resampled texture.
  assert max(errors) < 12 and np.mean(errors) < 7
  assert np.mean(unmoved) > 4 * np.mean(errors)


def test_visible_points_are_the_same_surface_in_both_views(pairs):
  for pair in pairs:
    points = pair.first.points @ pair.rotation.T + pair.translation
    i, j = np.nonzero(pair.visible)
    y, x = np.floor(pair.correspondence[i, j] * 96).astype(int).T
    assert y.min() >= 0 and x.min() >= 0 and y.max() < 96 and x.max() < 96
    same = pair.second.instances[y, x] == pair.first.instances[i, j]
    assert same.mean() > 0.96  # the rest lies within a pixel of an outline
    ratio = points[i, j, 2] / pair.second.depth[y, x]
    assert np.median(np.abs(ratio - 1)) < 0.02


def test_hidden_points_are_behind_a_nearer_surface(pairs):
  """Inside the second image and not visible: a nearer surface is shown."""
  behind = total = 0
  for pair in pairs:
    points = pair.first.points @ pair.rotation.T + pair.translation
    y, x = np.moveaxis(pair.correspondence, -1, 0)
    inside = (np.minimum(y, x) > 0.01) & (np.maximum(y, x) < 0.99)
    i, j = np.nonzero(inside & ~pair.visible & (points[..., 2] > 0.1))
    row, column = np.floor(pair.correspondence[i, j] * 96).astype(int).T
    shown = pair.second.depth[row, column]
    behind += np.sum(shown < points[i, j, 2] * 1.01)
    total += len(i)
  assert total > 1000 and behind / total > 0.95


def test_angle_of_the_second_camera():
  for index in range(100):
    world = layout.sample_world(index, 0)
    main = world.objects[0]
    centre = np.array([main.x, 0.0, main.z])
    second = layout.second_camera(world, index, 0)
    a = (world.camera.position - centre)[[0, 2]]
    b = (second.position - centre)[[0, 2]]
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert 1 < math.degrees(math.acos(min(cosine, 1))) < 28.1
    rect = world_lib.bounding_rect(second, main)
    assert 0 < rect.centre < 1


def test_main_object_is_in_both_views(pairs):
  for pair in pairs:
    assert np.sum(pair.second.instances == 2) > 20
    seen = pair.visible[pair.first.instances == 2].mean()
    assert seen > 0.25
    assert pair.second.objects[0].name in pair.second.captions[0]
