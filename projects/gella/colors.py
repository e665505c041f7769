"""Colours for masks and chips that stay apart, also for colour-blind readers."""

from __future__ import annotations

__all__ = ["Color", "ink_on", "palette"]

Color = tuple[int, int, int]
"""RGB, each 0..255."""

# Farthest-point search over the RGB cube from Okabe and Ito's orange and blue: each colour has the
# largest distance in CIELAB to those before it, taken as the smallest of four views: the normal one
# and those of protanopes, deuteranopes and tritanopes (Machado, Oliveira and Fernandes 2009). Very
# dark, very light and greyish ones are left out, the first eight being brighter than the rest,
# since masks lie on a grey picture. From the ninth on, blocks of eight are put in the order in
# which neighbours differ most.
_COLORS: tuple[Color, ...] = (
    (230, 159, 0), (0, 114, 178), (0, 255, 192), (200, 0, 56), (144, 80, 255),
    (240, 176, 255), (192, 232, 128), (216, 80, 128), (104, 8, 176), (240, 232, 0),
    (136, 8, 96), (120, 184, 112), (232, 112, 255), (40, 80, 24), (0, 192, 184),
    (160, 120, 0), (168, 8, 80), (0, 40, 224), (128, 16, 128), (255, 128, 176),
    (176, 176, 80), (240, 0, 200), (168, 248, 96), (184, 64, 136), (144, 56, 208),
    (255, 184, 152), (56, 144, 224), (144, 80, 0), (144, 240, 224), (232, 56, 64),
    (112, 24, 152), (96, 144, 88), (200, 16, 160), (48, 112, 48), (208, 144, 216),
    (152, 0, 24), (112, 216, 56), (208, 128, 128), (128, 112, 248), (248, 96, 56),
    (168, 128, 176), (64, 224, 152), (200, 160, 248), (168, 32, 104), (160, 200, 112),
    (152, 40, 128), (104, 48, 216), (255, 152, 208), (48, 72, 255), (192, 56, 96),
    (192, 208, 96), (144, 24, 56), (168, 96, 200), (40, 168, 80), (240, 200, 255),
    (224, 128, 16), (24, 96, 152), (200, 144, 88), (136, 152, 255), (184, 120, 152),
    (224, 232, 160), (176, 16, 168), (24, 136, 104), (232, 80, 224),
)  # fmt: skip


def palette(count: int) -> list[Color]:
    """Return ``count`` distinct RGB colours (0..255), the first ones being those farthest apart.

    A shorter palette is the start of a longer one. The first 64 were searched for; later ones are
    their lighter and darker shades.
    """
    colors: list[Color] = []
    for index in range(count):
        red, green, blue = _COLORS[index % len(_COLORS)]
        turn = index // len(_COLORS)
        # Shades alternate: towards white, towards black, each round a step further.
        share = 1 - 0.6 ** ((turn + 1) // 2)
        target = 255 if turn % 2 else 0
        shade = [round(value + (target - value) * share) for value in (red, green, blue)]
        colors.append((shade[0], shade[1], shade[2]))
    return colors


def ink_on(color: Color, dark: Color = (25, 25, 25), light: Color = (255, 255, 255)) -> Color:
    """Return the ink, ``dark`` or ``light``, that has more contrast (WCAG 2) on a colour."""

    def contrast(ink: Color) -> float:
        low, high = sorted((_luminance(ink), _luminance(color)))
        return (high + 0.05) / (low + 0.05)

    return max(dark, light, key=contrast)


def _luminance(color: Color) -> float:
    parts = (value / 255 for value in color)
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
