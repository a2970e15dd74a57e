"""What Prefect is given: the deployment of prefect.yaml, and templates of notifications."""

from __future__ import annotations

import re

import yaml

from tests.support.paths import ROOT


def test_the_deployment_for_work_pools_is_valid_and_has_the_schedule_of_the_parameters() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.utilities.importtools import import_object

    raw = yaml.safe_load((ROOT / "flows/prefect.yaml").read_text(encoding="utf-8"))
    (deployment,) = PrefectYamlModel.model_validate(raw).deployments
    own = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["nightly"]
    (schedule,) = raw["deployments"][0]["schedules"]
    assert (schedule["cron"], schedule["timezone"]) == (own["cron"], own["timezone"])
    strategy = {"cancel": "CANCEL_NEW", "queue": "ENQUEUE"}[own["overlap"]]
    assert raw["deployments"][0]["concurrency_limit"] == {"limit": 1, "collision_strategy": strategy}
    assert deployment.name == "nightly"
    path, _, name = deployment.entrypoint.partition(":")
    assert import_object(f"{path.removesuffix('.py').replace('/', '.')}.{name}").name == "night"


def test_templates_of_notifications_are_valid_for_prefect() -> None:
    from uuid import uuid4

    from prefect.blocks.notifications import SendgridEmail
    from prefect.server.events.schemas.automations import AutomationCreate
    from prefect.server.utilities.user_templates import validate_user_template

    from flows import notification

    for is_webhook in (True, False):
        automation = notification.template(["accept", "failed"], uuid4(), is_webhook)
        AutomationCreate.model_validate(automation.model_dump(mode="json", exclude={"id"}))
        assert automation.trigger.expect == {"edgepress.night.accept", "edgepress.night.failed"}
    for text in (notification.SUBJECT, notification.BODY, notification.PAYLOAD):
        validate_user_template(text)
    SendgridEmail(api_key="x", sender_email="a@example.org", to_emails=["b@example.org"])
    assert re.fullmatch(r"[a-z.]+", notification.EVENT)
