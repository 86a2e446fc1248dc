"""NiiVue as npm places it here, and the licences of what its bundle holds."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.errors import InputError

FOLDER = Path(__file__).parent
NIIVUE = FOLDER / "node_modules/@niivue/niivue/dist/index.js"


def niivue() -> Path:
    """The module.

    Raises:
        InputError: it is not there.
    """
    if not NIIVUE.is_file():
        raise InputError(
            f"{NIIVUE}: the volume viewer NiiVue is not there; run make explorer in the checkout once (it fetches NiiVue, "
            f"hashes checked), or npm ci --prefix {FOLDER}"
        )
    return NIIVUE


def licences() -> str:
    """The licence of NiiVue, and of each package that its bundle holds."""
    parts = ["NiiVue (@niivue/niivue)\n\n" + (FOLDER / "LICENSE-niivue.txt").read_text(encoding="utf-8")]
    for path in sorted((FOLDER / "node_modules").glob("**/[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*")):
        if path.is_file():
            name = path.parent.relative_to(FOLDER / "node_modules").as_posix()
            parts.append(f"{name}\n\n{path.read_text(encoding='utf-8')}")
    return ("\n" + "-" * 80 + "\n").join(parts)
