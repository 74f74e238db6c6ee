"""vLLM's environment: what a user has set stays, but for the runner that plans need."""

from vgf_llm.engines.vllm_env import (
    ADAPTERS_AT_RUNTIME,
    ERRORS_ALONE,
    IN_THIS_PROCESS,
    api_key,
    prepare_start,
    runs_in_this_process,
    set_defaults,
    stated,
)


def test_what_is_set_stays_and_the_first_group_counts():
    environment = {"VLLM_LOGGING_LEVEL": "INFO"}
    set_defaults(environment, ERRORS_ALONE, IN_THIS_PROCESS, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert environment == {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_a_start_needs_the_old_runner_and_a_clear_standard_output(monkeypatch):
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    monkeypatch.setattr("os.environ", environment)
    prepare_start(has_gpu=True)
    expected = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "DEBUG"}
    assert environment == {**expected, "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    prepare_start(has_gpu=False)
    assert environment["VLLM_USE_AOT_COMPILE"] == "0"


def test_an_empty_key_is_none_and_the_engines_place_is_read(monkeypatch):
    monkeypatch.setattr("os.environ", {"VLLM_API_KEY": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    assert api_key() is None and runs_in_this_process()
    monkeypatch.setattr("os.environ", {"VLLM_API_KEY": "secret"})
    assert api_key() == "secret" and not runs_in_this_process()
    assert stated(ADAPTERS_AT_RUNTIME) == "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
