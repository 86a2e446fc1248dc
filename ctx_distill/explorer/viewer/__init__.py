"""NiiVue as npm or a wheel of `make wheel` places it here, and the licences of the packages in its bundle."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.errors import InputError

FOLDER = Path(__file__).parent
NIIVUE = FOLDER / "node_modules/@niivue/niivue/dist/index.js"


def niivue() -> Path:
    """Return the path of the NiiVue module.

    Raises:
        InputError: NiiVue is not installed.
    """
    if not NIIVUE.is_file():
        raise InputError(
            f"{NIIVUE}: the volume viewer NiiVue is missing. Install a wheel that `make wheel` built, run `make explorer` in"
            f" a checkout, or run `npm ci --omit=optional --prefix {FOLDER}`; the hashes are checked."
        )
    return NIIVUE


def licences() -> str:
    """Return the licences of NiiVue and of the packages in its bundle."""
    parts = ["NiiVue (@niivue/niivue)\n\n" + (FOLDER / "LICENSE-niivue.txt").read_text(encoding="utf-8")]
    for path in sorted((FOLDER / "node_modules").glob("**/[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*")):
        if path.is_file():
            name = path.parent.relative_to(FOLDER / "node_modules").as_posix()
            parts.append(f"{name}\n\n{path.read_text(encoding='utf-8')}")
    return ("\n" + "-" * 80 + "\n").join(parts)
