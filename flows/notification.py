"""`edgepress notify`: an automation that tells each night's verdict to a webhook or by e-mail.

    edgepress notify --webhook https://chat.example/hook              every verdict, figures as JSON
    edgepress notify --email me@example.org --on regression anomalous  by SendGrid, key in SENDGRID_API_KEY
    edgepress notify --webhook URL --print                             the automation as YAML, not created

It writes a block with the address (or key) into the running server, and one automation, which it replaces when asked
again. Its trigger are the events of flows/night.py, `edgepress.night.VERDICT`; the templates below use what is in their
payload. `--print` is for `prefect automation create --from-file`; the block is saved for that, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from typing import Any
from uuid import UUID

import yaml

from flows.server import settings

settings.apply()

from prefect.automations import Automation  # noqa: E402  the settings must be in the environment before Prefect's import
from prefect.blocks.core import Block  # noqa: E402
from prefect.blocks.notifications import SendgridEmail  # noqa: E402
from prefect.blocks.webhook import Webhook  # noqa: E402
from prefect.events.actions import CallWebhook, SendNotification  # noqa: E402
from prefect.events.schemas.automations import EventTrigger, Posture  # noqa: E402

from flows.night import EVENT  # noqa: E402
from tasks.algorithms.errors import InputError  # noqa: E402
from tasks.algorithms.statistics.gate import VERDICTS  # noqa: E402
from tasks.nightly.records import FAILED  # noqa: E402

SUBJECT = "edgepress {{ event.payload.verdict }}: {{ event.payload.night }}"
BODY = """{{ event.payload.verdict }}: {{ event.payload.reason }}
{{ event.payload.promotion }}
{% for name, value in (event.payload.figures or {}).items() %}{{ name }} {{ value }}
{% endfor %}"""
PAYLOAD = "{{ event.payload | tojson }}"
"""Of the webhook: the whole payload of the event."""


def main(arguments: list[str]) -> int:
    """Create or print the automation; returns the exit code."""
    parser = argparse.ArgumentParser(prog="edgepress notify", description="tell the nights' verdicts")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--webhook", metavar="URL", help="POST the event's payload there")
    where.add_argument("--email", metavar="ADDRESS", nargs="+", help="send a mail by SendGrid")
    parser.add_argument("--on", nargs="+", choices=_names(), default=_names(), help="verdicts to tell (default: all)")
    parser.add_argument("--print", action="store_true", help="save the block and print the automation as YAML instead")
    chosen = parser.parse_args(arguments)
    try:
        if not settings.running_server():
            raise InputError("no Prefect server answers; `make ui` in another terminal starts it")
        found = template(chosen.on, *_block(chosen))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if chosen.print:
        print(yaml.safe_dump(found.model_dump(mode="json", exclude={"id"}), sort_keys=False), end="")
        return 0
    for old in _named(found.name):
        old.delete()
    print(f"automation {found.create().name} tells {', '.join(chosen.on)}")
    return 0


def template(verdicts: list[str], block: UUID, webhook: bool) -> Automation:
    """The automation: one action for each event of these verdicts.

    Args:
        verdicts: in lower case.
        block: of the address.
    """
    action: Any = CallWebhook(block_document_id=block, payload=PAYLOAD)
    if not webhook:
        action = SendNotification(block_document_id=block, subject=SUBJECT, body=BODY)
    trigger = EventTrigger(
        expect={f"{EVENT}.{verdict}" for verdict in verdicts},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    kind = "webhook" if webhook else "e-mail"
    description = "verdict and figures of each night"
    return Automation(name=f"edgepress nights by {kind}", description=description, trigger=trigger, actions=[action])


def _block(chosen: argparse.Namespace) -> tuple[UUID, bool]:
    """(the saved block, whether it is a webhook)."""
    if chosen.webhook:
        block: Block = Webhook(url=chosen.webhook, headers={"Content-Type": "application/json"})
    elif key := os.environ.get("SENDGRID_API_KEY"):
        sender = os.environ.get("SENDGRID_SENDER", chosen.email[0])
        block = SendgridEmail(api_key=key, sender_email=sender, to_emails=chosen.email)
    else:
        raise InputError("SENDGRID_API_KEY is not set; give the key of your SendGrid account, or use --webhook")
    return block.save("edgepress-nights", overwrite=True), bool(chosen.webhook)


def _names() -> list[str]:
    return [verdict.lower() for verdict in (*VERDICTS, FAILED)]


def _named(name: str) -> list[Automation]:
    try:
        return [Automation.read(name=name)]
    except ValueError:  # there is none
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
