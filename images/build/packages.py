"""Add what dpkg has installed to a CycloneDX list of Python packages; needs cyclonedx-python-lib."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


def installed(status: str) -> Iterator[Component]:
    """Each package that dpkg's `status` file calls installed."""
    for paragraph in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if line[:1].strip() and ": " in line)
        if fields.get("Status") == "install ok installed":
            name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
            url = PackageURL("deb", "debian", name, version, {"arch": architecture})
            kind = ComponentType.LIBRARY
            yield Component(name=name, version=version, type=kind, purl=url, bom_ref=url.to_string())


def main(python_list: Path, dpkg_status: Path, to: Path) -> None:
    """Write the merged list, in an order that depends on its content alone."""
    bom = Bom.from_json(json.loads(python_list.read_text(encoding="utf-8")))  # type: ignore[attr-defined]
    bom.components.update(installed(dpkg_status.read_text(encoding="utf-8")))
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    for name in ("serialNumber", "timestamp"):  # the only things that differ between two lists of the same packages
        content.pop(name, None)
        content.get("metadata", {}).pop(name, None)
    to.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
