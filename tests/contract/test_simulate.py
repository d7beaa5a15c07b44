"""Unmodified Flower apps under ``simulate``: what runs on Flower must run here, and the same."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, Result
from flwr.supercore import telemetry
from flwr.supercore.task_identity import TaskIdentity

from fedkd.engine.executors import Threads
from fedkd.engine.simulate import SimulationResult, simulate
from fedkd.errors import ConfigError, RunError


def numpy_client() -> ClientApp:
    """A client that moves towards its partition's number and counts its calls in its state."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        target = float(context.node_config["partition-id"])
        calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
        context.state["calls"] = MetricRecord({"n": calls})
        rate = float(context.run_config.get("lr", 0.5))
        weights = weights + rate * (target - weights)
        metrics = MetricRecord({"num-examples": 1 + int(target), "calls": calls})
        arrays = ArrayRecord([weights.astype(np.float32)])
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        loss = float(np.mean((weights - context.node_config["partition-id"]) ** 2))
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query("logits")
    def logits(message: Message, context: Context) -> Message:
        p = int(context.node_config["partition-id"])
        arrays = ArrayRecord([np.full((2, 3), p, np.float32)])
        return Message(RecordDict({"logits": arrays}), reply_to=message)

    return app


def fedavg(results: list[Result], rounds: int = 3, **options: Any) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord([np.zeros(4, np.float32)])
        results.append(FedAvg(**options).start(grid, start, num_rounds=rounds))

    return app


def weights(result: Result) -> bytes:
    return b"".join(array.data for array in result.arrays.values())


def run_fedavg(nodes: int = 5, **options: Any) -> tuple[Result, SimulationResult]:
    results: list[Result] = []
    done = simulate(fedavg(results), numpy_client(), nodes, **options)
    return results[0], done


def test_fedavg_computes_the_weighted_mean_and_clients_keep_their_state() -> None:
    result, done = run_fedavg(5, run_config={"lr": 1.0})
    expected = np.average(np.arange(5), weights=np.arange(5) + 1)
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], expected, rtol=1e-6)
    calls = [dict(result.train_metrics_clientapp)[r]["calls"] for r in (1, 2, 3)]
    np.testing.assert_allclose(calls, [1, 2, 3])
    assert all(c.state["calls"]["n"] == 3 for c in done.grid.contexts.values())
    assert done.failures == []
    assert done.seconds > 0


def test_all_nodes_train_in_round_one() -> None:
    _, done = run_fedavg(20)
    assert done.ledger.totals(round=1, phase="train", direction="up").messages == 20


def test_ledger_knows_the_bytes_of_a_run() -> None:
    _, done = run_fedavg(5)
    for round in (1, 2, 3):
        for phase, up in (("train", 5 * 16), ("evaluate", 0)):
            assert done.ledger.totals(round=round, phase=phase, direction="down").tensor == 5 * 16
            assert done.ledger.totals(round=round, phase=phase, direction="up").tensor == up


def test_two_runs_and_every_executor_agree_bit_for_bit() -> None:
    runs = [
        run_fedavg(7),
        run_fedavg(7),
        run_fedavg(7, executor="thread", workers=3),
        run_fedavg(7, executor=Threads(workers=2)),
    ]
    assert len({weights(result) for result, _ in runs}) == 1
    assert len({str(result.evaluate_metrics_clientapp) for result, _ in runs}) == 1
    assert all(done.ledger.state_dict() == runs[0][1].ledger.state_dict() for _, done in runs)


def test_sampling_of_clients_goes_by_the_seed_and_leaves_no_trace() -> None:
    def cohort(seed: int | None) -> bytes:
        results: list[Result] = []
        simulate(fedavg(results, 4, fraction_train=0.3), numpy_client(), 10, seed=seed)
        return weights(results[0])

    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert cohort(1) == cohort(1)
    assert cohort(1) != cohort(2)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tobytes() == states[2]  # noqa: NPY002
    random.seed(5)
    mine = cohort(None)
    random.seed(5)
    assert cohort(None) == mine


def test_a_failing_client_does_not_harm_the_others(caplog: pytest.LogCaptureFixture) -> None:
    app = numpy_client()

    @app.train("fragile")
    def fragile(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise OSError("disk gone")
        return Message(RecordDict(), reply_to=message)

    server = ServerApp()
    replies: list[Message] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        ask = [Message(RecordDict(), n, "train.fragile", group_id="4") for n in grid.get_node_ids()]
        replies.extend(grid.send_and_receive(ask))

    with caplog.at_level(logging.ERROR):
        done = simulate(server, app, 3)
    assert [r.has_error() for r in replies] == [False, True, False]
    assert [(f.partition_id, f.message_type, f.round) for f in done.failures] == [
        (1, "train.fragile", 4)
    ]
    assert "disk gone" in done.failures[0].traceback
    assert "disk gone" in caplog.text


def test_queries_and_the_polling_style_of_servers() -> None:
    server = ServerApp()
    means: list[float] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        asked = [Message(RecordDict(), node, "query.logits") for node in grid.get_node_ids()]
        waiting = set(grid.push_messages(asked))
        replies: list[Message] = []
        while waiting:
            got = list(grid.pull_messages(waiting))
            replies += got
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
        arrays = [r.content["logits"].to_numpy_ndarrays()[0] for r in replies]
        means.extend(float(a.mean()) for a in arrays)
        context.state["mean"] = MetricRecord({"mean": float(np.mean(arrays))})

    done = simulate(server, numpy_client(), 4)
    assert means == [0, 1, 2, 3]
    assert done.context.state["mean"]["mean"] == 1.5


def test_mods_and_lifespans_run() -> None:
    order: list[str] = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        order.append("before")
        reply = call_next(message, context)
        order.append("after")
        return reply

    client, server = ClientApp(mods=[mod]), ServerApp()

    @client.lifespan()
    def client_lifespan(context: Context) -> Iterator[None]:
        order.append("client up")
        yield
        order.append("client down")

    @client.query()
    def query(message: Message, context: Context) -> Message:
        order.append("query")
        return Message(RecordDict(), reply_to=message)

    @server.lifespan()
    def server_lifespan(context: Context) -> Iterator[None]:
        order.append("server up")
        yield
        order.append("server down")

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        grid.send_and_receive([Message(RecordDict(), n, "query") for n in grid.get_node_ids()])

    simulate(server, client, 1)
    inside = ["client up", "before", "query", "after", "client down"]
    assert order == ["server up", *inside, "server down"]


def test_flowers_own_clipping_wrapper_and_mod_run() -> None:
    server, client = ServerApp(), ClientApp(mods=[fixedclipping_mod])
    found: list[Result] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = [a + 100 for a in message.content["arrays"].to_numpy_ndarrays()]
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        inner = FedAvg(fraction_evaluate=0.0)
        strategy = DifferentialPrivacyClientSideFixedClipping(inner, 0.01, 2.0, 3)
        start = ArrayRecord([np.zeros(4, np.float32)])
        found.append(strategy.start(grid, start, num_rounds=1))

    done = simulate(server, client, 3)
    assert done.failures == []
    np.testing.assert_allclose(found[0].arrays.to_numpy_ndarrays()[0], np.ones(4), atol=0.1)


def test_legacy_numpy_client_and_server_fn_run() -> None:
    class Client(NumPyClient):
        def __init__(self, context: Context) -> None:
            self.target = float(context.node_config["partition-id"])

        def fit(self, parameters: list, config: dict) -> tuple[list, int, dict]:
            return [np.full(3, self.target)], 1, {}

        def evaluate(self, parameters: list, config: dict) -> tuple[float, int, dict]:
            return float(np.mean(parameters[0])), 1, {}

    losses: list[float] = []

    def server_fn(context: Context) -> ServerAppComponents:
        def evaluate(round: int, parameters: list, config: dict) -> tuple[float, dict]:
            losses.append(float(np.mean(parameters[0])))
            return losses[-1], {}

        strategy = LegacyFedAvg(
            initial_parameters=ndarrays_to_parameters([np.zeros(3)]), evaluate_fn=evaluate
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    client = ClientApp(client_fn=lambda context: Client(context).to_client())
    done = simulate(ServerApp(server_fn=server_fn), client, 4)
    np.testing.assert_allclose(losses, [0.0, 1.5, 1.5])
    assert done.failures == []
    assert done.ledger.totals(direction="up").messages == 2 * 2 * 4


def torch_client(generator: torch.Generator | None) -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        noise = torch.randn(3, generator=generator)
        content = RecordDict({"x": ArrayRecord([noise.numpy()])})
        return Message(content, reply_to=message)

    return app


def test_clients_that_draw_from_global_generators_repeat_themselves() -> None:
    def drawn(seed: int) -> list[bytes]:
        server, found = ServerApp(), []

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            asked = [Message(RecordDict(), n, "query") for n in grid.get_node_ids()]
            found.extend(r.content["x"]["0"].data for r in grid.send_and_receive(asked))

        simulate(server, torch_client(None), 3, seed=seed)
        return found

    assert drawn(0) == drawn(0)
    assert len(set(drawn(0) + drawn(1))) == 6


@pytest.mark.parametrize("shared", [True, False])
def test_threads_warn_where_clients_draw_from_global_generators(
    shared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(3):
            grid.send_and_receive([Message(RecordDict(), n, "query") for n in grid.get_node_ids()])

    client = torch_client(None if shared else torch.Generator())
    simulate(server, client, 3)
    assert "global random generator" not in caplog.text
    simulate(server, client, 3, executor="thread", workers=2)
    assert caplog.text.count("global random generator") == (1 if shared else 0)


def test_nested_run_config_reaches_both_sides() -> None:
    server, seen = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append(dict(context.run_config))

    done = simulate(server, numpy_client(), 2, run_config={"a": {"b": {"c": 1}}, "d": "x"})
    assert seen == [{"a.b.c": 1, "d": "x"}]
    assert done.grid.contexts[1001].run_config == seen[0]


def test_one_node_too_few_ends_with_advice_instead_of_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _: None)
    with pytest.raises(RunError, match=r"more nodes than the 1 there are.*min_available_nodes"):
        simulate(fedavg([]), numpy_client(), 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_supernodes": 0}, "num_supernodes = 0: at least 1"),
        ({"num_supernodes": 2.0}, "num_supernodes = 2.0: expected a whole number"),
        ({"num_supernodes": True}, "num_supernodes = True"),
        ({"server_app": ClientApp()}, "server_app must be a flwr ServerApp, got ClientApp"),
        ({"client_app": print}, "client_app must be a flwr ClientApp"),
        ({"executor": "tread"}, "unknown executor 'tread'; did you mean 'thread'"),
        ({"executor": "thread", "workers": 0}, "workers = 0"),
        ({"executor": Threads(), "workers": 2}, "an Executor without workers"),
        ({"executor": None}, "give the name of an executor"),
        ({"run_config": {"a": {"b": [1]}}}, r"run_config\['a.b'\].*not list"),
        ({"node_configs": [{}]}, "node_configs has 1 entries for 2 nodes"),
    ],
)
def test_wrong_arguments_are_explained(change: dict[str, Any], says: str) -> None:
    arguments = {"server_app": ServerApp(), "client_app": ClientApp(), "num_supernodes": 2}
    with pytest.raises(ConfigError, match=says):
        simulate(**{**arguments, **change})


def failing_server(during: list[Any]) -> ServerApp:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        during.append((logging.getLogger("flwr").level, torch.get_num_threads()))
        try:
            simulate(ServerApp(), ClientApp(), 1)
        except RunError as error:
            during.append(str(error))
        raise ZeroDivisionError("the app's own")

    return server


def test_everything_is_put_back_after_an_error_and_nesting_is_refused() -> None:
    logger, during = logging.getLogger("flwr"), []
    level, before = logger.level, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError, match="the app's own"):
            simulate(failing_server(during), ClientApp(), 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert during[0] == (logging.WARNING, 1)
    assert "another simulation is running" in during[1]
    assert logger.level == level
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        _ = TaskIdentity.run_id


def test_it_runs_in_a_thread_and_again_afterwards() -> None:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(weights(run_fedavg(3)[0])))
    thread.start()
    thread.join()
    assert found == [weights(run_fedavg(3)[0])]


def test_flower_says_nothing_unless_asked_to(caplog: pytest.LogCaptureFixture) -> None:
    run_fedavg(2)
    assert caplog.records == []
    run_fedavg(2, verbose=True)
    assert "configure_train" in caplog.text


def test_no_usage_report_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[object] = []
    monkeypatch.setattr(telemetry, "create_event", lambda *event: reports.append(event) or "")
    run_fedavg(2)
    assert reports == []
    telemetry.event(telemetry.EventType.PING).result(timeout=30)
    assert len(reports) == 1
