"""Add the pages of data_manifests/ to the site, so that they have one source."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parents[2] / "data_manifests"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page of data_manifests/ as manifests/NAME, with its links into docs/ adjusted."""
    for page in sorted(FOLDER.glob("*.md")):
        content = page.read_text(encoding="utf-8").replace("](../docs/", "](../")
        files.append(File.generated(config, f"manifests/{page.name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links into data_manifests/, as they work in the repository, into links within the site."""
    return markdown.replace("](../data_manifests/", "](manifests/")
