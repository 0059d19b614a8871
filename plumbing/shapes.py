"""Drawn images of textured shapes on textured grounds: every script runs offline. No substitute for photographs."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

TEXTURES = ("shading", "stripes", "checks", "dots", "grid", "waves", "rings", "rays", "dashes", "ripples")
SHAPES = ("disc", "ring", "triangle", "square", "cross")  # the classes of scenes
SPLITS = ("train", "val")  # their indices below, and their seeds
DRAWN, SCENES = (4000, 1000), (2500, 200)  # numbers drawn of each split: images, and scenes of shapes to find
_CHUNK = 50  # images drawn at once; a multiple of the number of textures keeps the classes balanced
_IMAGES = dict(
    shapes=("disc", "ring", "crescent", "triangle", "square", "cross", "star", "flower", "heart", "spiral"),
    layers=((0.12, 0.2, 0.9), (0.12, 0.2, 0.9), (0.35, 0.6, 0.5)),  # back to front: least and largest radius, offset
    rotation=2 * np.pi, fills=len(TEXTURES), light=(0.15, 0.85), contrast=1, difference=(0.35, 0.65), step=0,
)  # fmt: skip
_SCENES = dict(  # plain shapes, mostly brighter than what is behind them
    shapes=SHAPES, layers=((0.25, 0.4, 0.65),) * 3,
    rotation=0.5, fills=1, light=(0.05, 0.3), contrast=0.4, difference=(0.1, 0.5), step=0.2,
)  # fmt: skip


def draw_images(n: int, seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw `n` images of textured shapes on textured backgrounds: uint8 (n, size, size, 3) and their classes (n,).

    The class is the ground's texture. Its scale, rotation and colours, the light, and three shapes in front of it with
    their own textures are nuisances. Textures are periodic and shapes symmetric, so a hidden patch can be guessed.
    """
    return tuple(_draw(n, seed, size, **_IMAGES)[:2])


def draw_scenes(n: int, seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images of plain shapes: uint8 (n, S, S, 3); the shapes' kinds (n, 3); masks, bool (n, 3, S, S).

    A kind is an index into SHAPES, back to front; a mask is the part that no later shape hides.
    """
    images, _, kinds, masks = _draw(n, seed, size, **_SCENES)
    return images, kinds, masks


def _draw(n, seed, size, **look):
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the GIL; small chunks stay in the cache
        chunks = list(pool.map(lambda chunk: _draw_chunk(seed, chunk, size, **look), range(-(-n // _CHUNK))))
    return [np.concatenate(parts)[:n] for parts in zip(*chunks)]


def _draw_chunk(seed, chunk, size, shapes, layers, rotation, fills, light, contrast, difference, step):
    n, rng = _CHUNK, np.random.default_rng([seed, chunk, size])
    labels = rng.permutation(np.arange(n) % len(TEXTURES))
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.broadcast_to(axis, (n, size, size)), np.broadcast_to(axis[:, None], (n, size, size))
    ground = rng.uniform(*light, size=(n, 1, 1, 3)).astype(np.float32)
    picture = _texture(rng, x, y, ground, labels, contrast)
    masks, all_kinds = np.zeros((n, 3, size, size), dtype=bool), np.empty((n, 3), dtype=np.int64)
    for layer, (least, most, reach) in enumerate(layers):
        kinds = all_kinds[:, layer] = rng.integers(len(shapes), size=n)
        radius = _uniform(rng, n, least, most)
        u, v = x - _uniform(rng, n, -reach, reach), y - _uniform(rng, n, -reach, reach)
        u, v = _turn(u, v, _uniform(rng, n, 0, rotation))
        inside = np.empty_like(picture[..., :1])
        for k, shape in enumerate(shapes):
            chosen = kinds == k
            distance = _distance(shape, u[chosen] / radius[chosen], v[chosen] / radius[chosen]) * radius[chosen]
            inside[chosen, :, :, 0] = np.clip(0.5 - distance * size / 3, 0, 1)  # a soft edge, about 1.5 pixels wide
        colour = ground + rng.uniform(*difference, size=ground.shape) + step * layer  # in every channel
        fill = _texture(rng, u, v, (colour % 1).astype(np.float32), rng.integers(fills, size=n), contrast)
        picture += inside * (fill - picture)
        masks[:, layer] = inside[..., 0] > 0.5
        masks[:, :layer] &= ~masks[:, layer : layer + 1]
    tilt_x, tilt_y = _turn(x, y, _uniform(rng, n, 0, 2 * np.pi))
    picture *= (1 + 0.2 * (tilt_x + 0.5 * tilt_y))[..., None]  # light from one side
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8), labels, all_kinds, masks


def _uniform(rng, n, low, high):
    return rng.uniform(low, high, size=(n, 1, 1)).astype(np.float32)


def _turn(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _texture(rng, x, y, colour, kinds, contrast):
    """(n, S, S) coordinates -> (n, S, S, 3): a colour (n, 1, 1, 3) varied by each image's kind of pattern."""
    n = len(x)
    u, v = _turn(x, y, _uniform(rng, n, 0, 2 * np.pi))
    frequency, phase = _uniform(rng, n, 8, 14), _uniform(rng, n, 0, 2 * np.pi)
    pattern = np.empty_like(u)
    for k, kind in enumerate(TEXTURES):
        chosen = kinds == k
        pattern[chosen] = _pattern(kind, u[chosen], v[chosen], frequency[chosen], phase[chosen])
    contrast = contrast * rng.uniform(0.15, 0.4, size=(n, 1, 1, 3)) * rng.choice((-1, 1), size=(n, 1, 1, 3))
    return colour + np.clip(pattern, -1, 1)[..., None] * contrast.astype(np.float32)


def _pattern(kind, u, v, frequency, phase):
    """Return about -1 to 1; values beyond are clipped later, which makes flat areas with soft edges."""
    a, b = np.sin(frequency * u + phase), np.sin(frequency * v)
    match kind:
        case "shading":
            return 0.8 * u
        case "stripes":
            return 2 * a
        case "checks":
            return 4 * a * b
        case "dots":
            return 2.5 * (a + b) - 2.5
        case "grid":
            return 3 * np.maximum(np.abs(a), np.abs(b)) - 2.2
        case "waves":
            return 2 * np.sin(frequency * u + 2 * np.sin(frequency * v / 1.5))
        case "rings":
            return 2 * np.sin(frequency * np.hypot(u, v) + phase)
        case "rays":
            return 2 * np.sin(6 * np.arctan2(v, u) + phase)
        case "dashes":
            return 2 * a * (np.sin(frequency * v / 3) > 0)
        case _:
            return 1.4 * (np.sin(0.7 * frequency * u + phase) + np.sin(0.6 * frequency * v + 2 * u))


def _distance(shape, u, v):
    """Return a signed distance, negative inside, roughly in units of the shape's radius."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    match shape:
        case "disc":
            return r - 0.9
        case "ring":
            return np.abs(r - 0.72) - 0.23
        case "crescent":
            return np.maximum(r - 1, 0.8 - np.hypot(u - 0.45, v))
        case "triangle" | "square":
            k = 3 if shape == "triangle" else 4
            return r * np.cos((angle % (2 * np.pi / k)) - np.pi / k) - (0.6 if k == 3 else 0.75)
        case "cross":
            return np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.3, np.maximum(np.abs(u), np.abs(v)) - 1)
        case "star":
            fold = np.abs((angle % (2 * np.pi / 5)) - np.pi / 5)  # 0 at a tip, pi / 5 in a notch
            return r * (0.5 + fold) - 0.55
        case "flower":
            return r - 0.75 - 0.25 * np.cos(5 * angle)
        case "heart":
            return np.hypot(u, 1.1 * v + 0.2 - 0.7 * np.sqrt(np.abs(u))) - 0.85
        case _:
            return np.maximum(0.35 - np.abs((angle / np.pi + 2.2 * r) % 2 - 1), r - 1) * 0.6
