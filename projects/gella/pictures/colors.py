"""Colours for masks and chips that stay apart, also for colour-blind readers."""

from __future__ import annotations

__all__ = ["Color", "ink_on", "palette"]

Color = tuple[int, int, int]
"""RGB, each 0..255."""

# Farthest-point search over the RGB cube from Okabe and Ito's orange and blue: each colour has the
# largest distance in CIELAB to those before it, taken as the smallest of four views: the normal one
# and those of protanopes, deuteranopes and tritanopes (Machado, Oliveira and Fernandes 2009). Very
# dark, very light and, in any view, greyish ones are left out, most strictly among the first eight,
# since masks lie on a grey picture. From the ninth on, blocks of eight are put in the order in
# which neighbours differ most.
_COLORS: tuple[Color, ...] = (
    (230, 159, 0), (0, 114, 178), (64, 255, 184), (200, 40, 56), (144, 80, 255),
    (240, 176, 255), (184, 240, 128), (0, 184, 120), (112, 56, 96), (232, 112, 255),
    (240, 232, 0), (104, 8, 176), (176, 168, 80), (136, 0, 128), (232, 8, 0),
    (176, 120, 160), (136, 32, 0), (255, 200, 80), (224, 8, 192), (64, 112, 56),
    (255, 120, 208), (128, 216, 128), (0, 40, 224), (224, 104, 96), (128, 88, 136),
    (128, 112, 248), (208, 56, 112), (56, 144, 224), (184, 112, 48), (144, 56, 208),
    (0, 216, 160), (112, 24, 152), (216, 128, 16), (144, 248, 160), (200, 160, 248),
    (80, 144, 80), (160, 56, 160), (152, 200, 48), (24, 72, 128), (240, 168, 152),
    (104, 48, 216), (88, 184, 216), (160, 16, 40), (48, 72, 255), (200, 200, 96),
    (16, 88, 32), (136, 240, 255), (88, 120, 0), (192, 96, 216), (192, 216, 24),
    (216, 144, 120), (80, 88, 152), (192, 168, 64), (40, 112, 72), (160, 248, 104),
    (152, 112, 168), (255, 0, 80), (144, 40, 184), (248, 56, 136), (64, 96, 216),
    (160, 48, 120), (136, 152, 255), (88, 0, 200), (248, 16, 184),
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
