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
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import yaml

from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics.gate import VERDICTS
from tasks.nightly.records import FAILED

if TYPE_CHECKING:
    from prefect.automations import Automation
    from prefect.blocks.core import Block

EVENT = "edgepress.night"
"""Events are called edgepress.night.accept, edgepress.night.regression, …, edgepress.night.failed."""
NAMES = [verdict.lower() for verdict in (*VERDICTS, FAILED)]
"""Their last words."""
SUBJECT = "edgepress {{ event.payload.verdict }}: {{ event.payload.night }}"
BODY = """{{ event.payload.verdict }}: {{ event.payload.reason }}
{{ event.payload.promotion }}
{% for name, value in (event.payload.figures or {}).items() %}{{ name }} {{ value }}
{% endfor %}"""
PAYLOAD = "{{ event.payload | tojson }}"
"""Of the webhook: the whole payload of the event."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--webhook", metavar="URL", help="POST the event's payload there")
    where.add_argument("--email", metavar="ADDRESS", nargs="+", help="send a mail by SendGrid")
    parser.add_argument("--on", nargs="+", choices=NAMES, default=NAMES, help="verdicts to tell (default: all)")
    parser.add_argument("--print", action="store_true", help="save the block and print the automation as YAML instead")


def main(given: argparse.Namespace) -> None:
    """Create or print the automation.

    Raises:
        InputError: no server, or no key for mails.
    """
    settings.apply()  # before Prefect is imported
    if not settings.running_server():
        raise InputError("no Prefect server answers; `make ui` in another terminal starts it")
    made = template(given.on, *_block(given))
    if given.print:
        print(yaml.safe_dump(made.model_dump(mode="json", exclude={"id"}), sort_keys=False), end="")
        return
    for old in _named(made.name):
        old.delete()
    print(f"automation {made.create().name} tells {', '.join(given.on)}")


def template(verdicts: list[str], block: UUID, webhook: bool) -> Automation:
    """The automation: one action for each event of these verdicts.

    Args:
        verdicts: in lower case.
        block: of the address.
    """
    from prefect.automations import Automation
    from prefect.events.actions import CallWebhook, SendNotification
    from prefect.events.schemas.automations import EventTrigger, Posture

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
    from prefect.blocks.notifications import SendgridEmail
    from prefect.blocks.webhook import Webhook

    if chosen.webhook:
        block: Block = Webhook(url=chosen.webhook, headers={"Content-Type": "application/json"})
    elif key := os.environ.get("SENDGRID_API_KEY"):
        sender = os.environ.get("SENDGRID_SENDER", chosen.email[0])
        block = SendgridEmail(api_key=key, sender_email=sender, to_emails=chosen.email)
    else:
        raise InputError("SENDGRID_API_KEY is not set; give the key of your SendGrid account, or use --webhook")
    return block.save("edgepress-nights", overwrite=True), bool(chosen.webhook)


def _named(name: str) -> list[Automation]:
    from prefect.automations import Automation

    try:
        return [Automation.read(name=name)]
    except ValueError:  # there is none
        return []
