# SPDX-License-Identifier: Apache-2.0
"""A name that clients may send belongs to one model of the pool."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from tests.serve.gateway.test_router import post, set_vllm_state, two
from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError
from tokenpool.serve.launch.launch_plan import plan_model
from tokenpool.serve.launch.names import check_names, names_of

pytestmark = pytest.mark.vllm

LORA = ("--enable-lora", "--lora-modules")


PATHS = ["../x", "/x", "a/../b", ".", "..", "a//b", "a/", "./x", "a\n", "a\x00b", "a\x7f", "x" * 600]


def plans(**args: tuple[str, ...]) -> list:
    """Plans of models with these flags; nothing is loaded, so none of the files need to exist."""
    return [plan_model(ModelSpec(name, f"org/{name}", flags)) for name, flags in args.items()]


def test_a_models_names_are_its_own_its_served_ones_and_its_adapters() -> None:
    """Every source of names is seen, in either spelling of the flag."""
    (plan,) = plans(a=("--served_model_name", "x", "y", *LORA, "l=/l", '{"name": "m", "path": "/m"}'))
    model, served, adapters = "model 'a'", "--served-model-name of model 'a'", "--lora-modules of model 'a'"

    assert [("a", model), ("x", served), ("y", served), ("l", adapters), ("m", adapters)] == list(names_of(plan))


@pytest.mark.parametrize(
    ("first", "second", "name", "owners"),
    [
        ((), ("--served-model-name", "a"), "a", "model 'a' and by --served-model-name of model 'b'"),
        (("--served-model-name", "b"), (), "b", "--served-model-name of model 'a' and by model 'b'"),
        (("--served-model-name", "x"), ("--served-model-name", "y", "x"), "x", "model 'a' and by --served-model-name"),
        ((), (*LORA, "a=/l"), "a", "model 'a' and by --lora-modules of model 'b'"),
        ((*LORA, "l=/1"), (*LORA, "l=/2"), "l", "--lora-modules of model 'a' and by --lora-modules of model 'b'"),
        (("--served-model-name=l",), (*LORA, "l=/2"), "l", "--served-model-name of model 'a' and by --lora-modules of"),
        ((), (*LORA, "b=/l"), "b", "model 'b' and by --lora-modules of model 'b'"),
        ((), (*LORA, "l=/1", "l=/2"), "l", "--lora-modules of model 'b' and by --lora-modules of model 'b'"),
    ],
)
def test_a_name_claimed_twice_is_refused(
    first: tuple[str, ...], second: tuple[str, ...], name: str, owners: str
) -> None:
    """The line names the name, both who claim it and the fix."""
    with pytest.raises(ConfigError) as caught:
        check_names(plans(a=first, b=second))

    message = str(caught.value)
    assert f"the name '{name}' is claimed twice, by " in message
    assert owners in message
    assert message.endswith(": rename one of them")
    assert "\n" not in message


def test_a_name_of_a_model_that_is_served_already_is_refused() -> None:
    """A model that is added later is held against all that is there."""
    with pytest.raises(ConfigError, match="'l' is claimed twice, by model 'c' and by --lora-modules of model 'a'"):
        check_names(plans(a=(*LORA, "l=/l")), {"l": "model 'c'"})


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("flag", ["--served-model-name", "--lora-modules", "--default-mm-loras"])
def test_a_name_that_is_a_path_is_refused(flag: str, name: str) -> None:
    """Clients and proxies drop parts of it, and it may be taken for a file; the line names the flag and the model."""
    values = {"--lora-modules": json.dumps({"name": name, "path": "/l"}), "--default-mm-loras": json.dumps({name: "/"})}
    with pytest.raises(ConfigError) as caught:
        check_names(plans(a=("--enable-lora", flag, values.get(flag, name))))

    assert f"{flag} of model 'a', is " in str(caught.value)
    assert str(caught.value).isprintable()


def test_names_of_the_hub_are_names() -> None:
    """With an organisation, a version, and letters of any language."""
    check_names(plans(a=("--served-model-name", "org/name", "org/name:v1.5", "...x", "модель", "a b")))


def test_names_that_differ_are_not_refused() -> None:
    """A model may serve its own name again, and others under as many names as it likes."""
    check_names(plans(a=("--served-model-name", "a", "x", "x"), b=(*LORA, "l=/l", "m=/m"), c=()))


@pytest.mark.parametrize(
    ("name", "status"), [("org/b", 400), ("served-org/b", 400), ("lora-b", 400), ("a", 200), ("lora-a", 200), (7, 200)]
)
@pytest.mark.parametrize("path", ["/models/a/v1/load_lora_adapter", "/v1/load_lora_adapter"])
def test_an_adapter_takes_no_name_of_another_model(path: str, name: object, status: int) -> None:
    """Neither its own name nor that of an adapter; what vLLM thinks of the other names is its matter."""
    router = two()
    set_vllm_state(router.models["a"], {"lora-a": object()})
    set_vllm_state(router.models["org/b"], {"lora-b": object()})
    response = post(router, path, json={"model": "a", "lora_name": name, "lora_path": "/l"})

    assert response.status_code == status
    if status == 400:
        error = response.json()["error"]
        assert error["param"] == "lora_name"
        assert error["message"].startswith(f"The name `{name}` belongs to another model")


def test_an_adapter_takes_no_name_of_a_model_that_is_not_loaded() -> None:
    """What a model will be called once it is there is its name already."""
    router = two()
    router.models["org/b"].claimed = {"org/b", "soon"}
    router.models["org/b"].state = "failed"
    response = post(router, "/models/a/v1/load_lora_adapter", json={"lora_name": "soon", "lora_path": "/l"})

    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("The name `soon` belongs to another model")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("path", "key"), [("/v1/load_lora_adapter", "lora_name"), ("/adapters", "name")])
def test_an_adapter_takes_no_name_that_is_a_path(path: str, key: str, name: str) -> None:
    """At both routes by which vLLM loads adapters; the answer is one of vLLM's errors."""
    response = post(two(), path, json={"model": "a", key: name})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == key
    assert response.json()["error"]["message"].isprintable()


def test_both_routes_of_adapters_know_the_names() -> None:
    """Also that of SageMaker."""
    response = post(two(), "/adapters", json={"model": "a", "name": "org/b", "src": "/l"})

    assert (400, "name") == (response.status_code, response.json()["error"]["param"])


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null"])
def test_an_adapter_without_a_name_goes_to_the_app(body: bytes) -> None:
    """vLLM says what is wrong with it."""
    assert post(two(), "/models/a/v1/load_lora_adapter", content=body).json()["app"] == "a"


@pytest.mark.parametrize("has_lora", [True, False])
def test_a_model_without_lora_takes_no_adapters(has_lora: bool) -> None:
    """400 that says how to start it, and not what its engine makes of the call."""
    router = two()
    config = SimpleNamespace(lora_config=object() if has_lora else None)
    set_vllm_state(router.models["a"], engine_client=SimpleNamespace(vllm_config=config))
    answer = post(router, "/models/a/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/l"})
    assert (200 if has_lora else 400) == answer.status_code
    assert has_lora or "--enable-lora" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/models/a/v1/load_lora_adapter", "/v1/load_lora_adapter"])
def test_where_vllm_has_no_route_for_adapters_its_app_says_so(path: str) -> None:
    """404, as from plain vLLM without VLLM_ALLOW_RUNTIME_LORA_UPDATING, whatever the model takes."""
    router = two()
    router.models["a"].app = Starlette(routes=[Route("/v1/completions", lambda request: None, methods=["POST"])])
    set_vllm_state(router.models["a"], engine_client=SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None)))
    assert 404 == post(router, path, json={"model": "a", "lora_name": "x", "lora_path": "/l"}).status_code
