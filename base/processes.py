"""Processes that work for this one: forked from one that has made its imports, and ended with this one."""

import os
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from threading import Thread

from pertstate.base.messages import given


def with_imports(*modules: str) -> BaseContext:
    """
    How processes are started. This process is not forked, as the threads of Arrow and of torch do not survive a fork. A process that
    has imported `modules` and computes nothing is forked instead; where a system has no such thing, each process starts by itself.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def end_with_parent():
    """Let this process end when the one that it works for has ended, however that ended."""

    def wait():
        given("a parent", parent_process()).join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
