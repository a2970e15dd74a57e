"""ONNX Runtime and its GenAI, told to send nothing home.

Once imported, each writes an identifier of this machine and a database of events below ~/.cache/Microsoft, and sends
them to its maker (1.32.0 and 0.18.0 for Linux). Their `disable_telemetry_events` comes too late for that; this variable
counts where it is set before the first import, so whoever imports one of them imports this module before.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
