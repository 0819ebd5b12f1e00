"""What servers answer: llama-server, and vLLM and others with /v1/completions."""

from __future__ import annotations

import json
from typing import Any, Protocol

from longrope_export.errors import ModelError
from longrope_export.runtimes.base import RuntimeInfo
from longrope_export.runtimes.http_client import JsonClient, RefusedError

_COUNTS = (1000, 100, 20, 5)  # tokens to ask for where a server refuses the whole vocabulary
_FORCED = 1e4  # logit bias that decides which token is sampled
_ID = "token_id:"
_PRECISIONS = {"all": "fp32", "f32": "fp32", "f16": "fp16"}  # "all F32" is llama.cpp's name


class Server(Protocol):
    """One kind of server.

    Attributes:
        vocabulary: tokens that it knows.
    """

    info: RuntimeInfo
    vocabulary: int

    def next_token(self, tokens: list[int], fresh: bool, slot: int) -> dict[int, float]:
        """Log probabilities (nats) of tokens that may follow, by their ids; at least one."""
        ...

    def tokenize(self, text: str) -> list[int] | None: ...

    def detokenize(self, tokens: list[int]) -> str | None: ...


def served_model(url: str, *, timeout: float = 600) -> str:
    """What a server says of the model that it serves, as JSON: another for another model.

    llama-server: the path of the file, its size and the program's build; others: the model's names.

    Raises:
        ModelError: the server cannot be reached, or answers as none that is known.
    """
    client = JsonClient(url, timeout)
    props, models = _props(client), client.call("/v1/models")
    with client.reading("/v1/models", models):
        model = models["data"][0]
        said = {name: model.get(name) for name in ("id", "root")}
        if props is not None:
            said["size"] = model["meta"].get("size")
            said |= {name: props.get(name) for name in ("model_path", "build_info")}
    return json.dumps(said)


def _props(client: JsonClient) -> Any:
    """What llama-server says; None of another server."""
    try:
        return client.call("/props")
    except RefusedError as error:
        if error.status not in (404, 405):
            raise
        return None


def open_server(client: JsonClient, vocabulary: int | None, named: int | None) -> Server:
    """Ask which kind of server it is; arguments as of HttpModel.

    Raises:
        ModelError: as HttpModel.
    """
    props = _props(client)
    if props is None:
        return _CompletionsServer(client, vocabulary, named)
    with client.reading("/props", props):
        return _LlamaServer(client, props, vocabulary, named)


class _LlamaServer:
    """llama-server's own endpoints: it names as many tokens as one likes, by their ids."""

    def __init__(
        self, client: JsonClient, props: Any, vocabulary: int | None, named: int | None
    ) -> None:
        self._client = client
        self._slots = int(props["total_slots"])
        models = client.call("/v1/models")
        with client.reading("/v1/models", models):
            self.vocabulary = int(models["data"][0]["meta"]["n_vocab"])
        if vocabulary not in (None, self.vocabulary):
            raise ModelError(
                f"{client.url} serves {props['model_path']} with {self.vocabulary} tokens in its "
                f"vocabulary, expected {vocabulary}: start it with an export of this model"
            )
        self._named = min(named or self.vocabulary, self.vocabulary)
        kind = str(props["model_ftype"]).lower().removeprefix("(guessed) ").split()[0]
        self.info = RuntimeInfo(
            name="llama-server",
            version=str(props["build_info"]),
            path=client.url,
            precision=_PRECISIONS.get(kind, kind),
            switching="as the server's llama.cpp does",
            log_probabilities=self._named,
            any_position=False,
            float32_angles=True,
            longest=int(props["default_generation_settings"]["n_ctx"]) - 1,  # it generates one
        )
        self._plain_token = self._find_plain_token()

    def next_token(self, tokens: list[int], fresh: bool, slot: int) -> dict[int, float]:
        answer = self._client.call(
            "/completion",
            prompt=tokens,
            n_predict=1,
            n_probs=self._named,
            temperature=0,
            cache_prompt=not fresh,
            id_slot=slot % self._slots,
            # the answer lacks the probabilities if what is sampled is a part of a character;
            # they themselves are those before the bias
            logit_bias=[[token, _FORCED] for token in self._plain_token],
        )
        with self._client.reading("/completion", answer):
            _check_length(self._client, answer["tokens_evaluated"], len(tokens))
            top = answer["completion_probabilities"][0]["top_logprobs"]
            return {int(entry["id"]): float(entry["logprob"]) for entry in top}

    def tokenize(self, text: str) -> list[int]:
        answer = self._client.call("/tokenize", content=text, add_special=True)
        with self._client.reading("/tokenize", answer):
            return [int(token) for token in answer["tokens"]]

    def detokenize(self, tokens: list[int]) -> str:
        answer = self._client.call("/detokenize", tokens=tokens)
        with self._client.reading("/detokenize", answer):
            return str(answer["content"])

    def _find_plain_token(self) -> list[int]:
        """The id of a token that is whole characters, in a list; empty if `a` has none."""
        answer = self._client.call("/tokenize", content="a", with_pieces=True)
        with self._client.reading("/tokenize", answer):
            pieces = {int(each["id"]): each["piece"] for each in answer["tokens"]}
            return [i for i, piece in pieces.items() if isinstance(piece, str) and piece][-1:]


class _CompletionsServer:
    """/v1/completions as vLLM has it: it names the likeliest tokens, as `token_id:123`."""

    def __init__(self, client: JsonClient, vocabulary: int | None, named: int | None) -> None:
        if vocabulary is None:
            raise ModelError(
                f"{client.url} does not say how many tokens its vocabulary has: name the model that it "
                "serves, or an export of it, too"
            )
        self._client, self.vocabulary = client, vocabulary
        models = client.call("/v1/models")
        with client.reading("/v1/models", models):
            self._model = str(models["data"][0]["id"])
            room = models["data"][0].get("max_model_len")
        self._named = self._find_named(min(named or vocabulary, vocabulary))
        self.info = RuntimeInfo(
            name=f"/v1/completions of {self._model}",
            version=self._version(),
            path=client.url,
            precision="unknown",
            switching="as the server does",
            log_probabilities=self._named,
            any_position=False,
            longest=None if room is None else int(room) - 1,
        )

    def next_token(self, tokens: list[int], fresh: bool, slot: int) -> dict[int, float]:
        return self._ask(tokens, self._named)

    def _ask(self, tokens: list[int], named: int) -> dict[int, float]:
        answer = self._client.call(
            "/v1/completions",
            model=self._model,
            prompt=tokens,
            max_tokens=1,
            logprobs=named,
            temperature=1.0,  # with top_p and top_k: the model's own distribution
            top_p=1.0,
            top_k=-1,
            return_tokens_as_token_ids=True,
        )
        with self._client.reading("/v1/completions", answer):
            _check_length(self._client, answer["usage"]["prompt_tokens"], len(tokens))
            top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            found = {self._id(name): float(value) for name, value in top.items()}
            largest = max(found)
        if largest >= self.vocabulary:
            raise ModelError(
                f"{self._client.url} names token {largest}, the vocabulary has "
                f"{self.vocabulary}: start it with an export of this model"
            )
        return found

    def tokenize(self, text: str) -> list[int] | None:
        """By /tokenize, which vLLM has."""
        try:
            answer = self._client.call("/tokenize", model=self._model, prompt=text)
        except RefusedError:
            return None
        with self._client.reading("/tokenize", answer):
            return [int(token) for token in answer["tokens"]]

    def detokenize(self, tokens: list[int]) -> str | None:
        """By /detokenize, which vLLM has."""
        try:
            answer = self._client.call("/detokenize", model=self._model, tokens=tokens)
        except RefusedError:
            return None
        with self._client.reading("/detokenize", answer):
            return str(answer["prompt"])

    def _id(self, name: str) -> int:
        if not name.startswith(_ID):
            raise ModelError(
                f"{self._client.url} names tokens by their texts ({name!r}), and several tokens can "
                "have one text: serve the model with vLLM, which knows return_tokens_as_token_ids, "
                "or with llama-server"
            )
        return int(name.removeprefix(_ID))

    def _find_named(self, wanted: int) -> int:
        """How many tokens the server names: what is wanted, or the largest that it allows."""
        for named in [wanted, *(count for count in _COUNTS if count < wanted)]:
            try:
                return min(named, len(self._ask([0], named)))
            except RefusedError as error:
                if error.status not in (400, 422):
                    raise
                refused = error
        raise refused

    def _version(self) -> str:
        try:
            return str(self._client.call("/version")["version"])
        except (ModelError, KeyError, TypeError):
            return "unknown"


def _check_length(client: JsonClient, got: int, expected: int) -> None:
    if got != expected:
        raise ModelError(
            f"{client.url} read {got} tokens of a prompt of {expected}: it must take prompts as they "
            "are, whole and without tokens of its own"
        )
