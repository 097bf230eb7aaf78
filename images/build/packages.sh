#!/bin/sh
# In the builder stage: list every package of the final image, those of Python and those of Debian, as CycloneDX.
set -eu
cd /build
/build/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON --spec-version 1.6 -o python.cdx.json \
  /opt/venv/bin/python
/build/tools/bin/python build/packages.py python.cdx.json base.status /opt/harness/packages.cdx.json
cp requirements.txt /opt/harness/requirements.txt
