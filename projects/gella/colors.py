"""Colours for masks and chips that stay apart, also for colour-blind readers."""

from __future__ import annotations

__all__ = ["Color", "ink_on", "palette"]

Color = tuple[int, int, int]
"""RGB, each 0..255."""

# Farthest-point search over the RGB cube from Okabe and Ito's orange and blue: each colour has the
# largest distance in CIELAB to those before it, taken as the smallest of four views: the normal one
# and those of protanopes, deuteranopes and tritanopes (Machado, Oliveira and Fernandes 2009). Very
# dark, very light and greyish ones are left out, since masks lie on a grey picture. From the ninth
# on, blocks of eight are put in the order in which neighbours differ most.
_COLORS: tuple[Color, ...] = (
    (230, 159, 0), (0, 114, 178), (88, 64, 24), (0, 255, 192), (136, 24, 255),
    (208, 200, 255), (160, 144, 80), (128, 16, 80), (160, 240, 128), (240, 104, 255),
    (224, 48, 0), (72, 184, 184), (64, 40, 176), (224, 88, 136), (255, 224, 0),
    (120, 32, 120), (152, 192, 136), (192, 16, 168), (208, 168, 80), (120, 88, 240),
    (168, 64, 128), (208, 224, 88), (192, 32, 80), (168, 152, 216), (40, 96, 64),
    (128, 200, 168), (208, 64, 208), (136, 232, 216), (0, 136, 8), (168, 112, 168),
    (96, 0, 208), (0, 144, 224), (200, 112, 104), (0, 0, 248), (128, 88, 40),
    (200, 232, 160), (184, 48, 104), (24, 208, 24), (104, 24, 144), (200, 184, 112),
    (144, 56, 200), (64, 152, 136), (224, 160, 255), (120, 64, 0), (72, 80, 144),
    (240, 160, 216), (128, 160, 48), (208, 136, 168), (128, 40, 208), (136, 56, 56),
    (168, 104, 255), (136, 40, 112), (240, 192, 104), (192, 80, 104), (0, 208, 224),
    (168, 104, 72), (128, 240, 248), (232, 128, 112), (112, 56, 232), (255, 160, 168),
    (240, 96, 48), (232, 104, 200), (0, 232, 136), (216, 64, 192),
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
