"""Several processes of one run, on the CPU: what torchrun starts, without its seconds."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SLOW_IMPORTS = [
    "pytest",
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "torch.distributed._composable.fsdp",
    "uptrain.training.loop",
]
_PATIENCE_SECONDS = 120
_PARTING_SECONDS = 10


class Started:
    """Processes that run a function of a test module, each knowing the others.

    They are forked from a server that has imported what takes long, once for all tests.
    """

    def __init__(self, count: int, act: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_SLOW_IMPORTS)
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "meeting"
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        self._answers = []
        self.processes = []
        for rank in range(count):
            receive, send = context.Pipe(duplex=False)
            told = (rank, count, meeting, send, act, arguments)
            process = context.Process(target=_run, args=(test, *told), daemon=True)
            process.start()
            send.close()
            self._answers.append(receive)
            self.processes.append(process)

    def results(self, patience_seconds: float = _PATIENCE_SECONDS) -> list[Any]:
        """Wait for what they return; an error of one is raised here."""
        try:
            outcomes = [_receive(each, patience_seconds) for each in self._answers]
            for process in self.processes:
                process.join(_PARTING_SECONDS)
        finally:
            self.kill()
        failed = [text for is_done, text in outcomes if not is_done]
        assert not failed, "\n".join(failed)
        return [result for _, result in outcomes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def in_processes(
    count: int,
    act: Callable[..., Any],
    *arguments: Any,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> list[Any]:
    """Give what a function of a test module returns in each of several processes."""
    return Started(count, act, *arguments).results(patience_seconds)


def _receive(pipe: Any, patience_seconds: float) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(patience_seconds) else (False, "does not answer")
    except EOFError:
        return False, "ended without an answer"


def _run(
    test: str,
    rank: int,
    count: int,
    meeting: Path,
    pipe: Any,
    act: Callable[..., Any],
    arguments: Any,
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "PYTEST_CURRENT_TEST": test}
    try:
        if count > 1:
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            os.environ |= {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
            where = f"file://{meeting}"
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
        pipe.send((True, act(*arguments)))
        if count > 1:
            dist.destroy_process_group()
    except BaseException:
        pipe.send((False, f"process {rank}: {traceback.format_exc()}"))
