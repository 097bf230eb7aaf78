"""What lines of a log say besides failures: who speaks, when, where a program is, how far it came, how it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass

FRAME = re.compile(
    r'File "(?P<file>[^"\n]{1,400})", line \d+, in (?P<function>\S{1,200})|\.py in \w{1,100}\('
    r"|\bFile (?P<place>\S{1,300}\.pyx?):(?P<number>\d{1,6}), in (?P<name>[\w.<>]{1,200})"
    r"|(?P<box>[^\s│|]{1,300}\.pyx?):(?P<row>\d{1,6}) in(?: (?P<def>[\w.<>]{1,200}))?[ │|]*$"
)
"""A frame as Python, old and new IPython and rich print it; rich may put the function's name in the next line."""
TRACEBACK = re.compile(r"Traceback \(most recent call last\)|\.py in \w{1,100}\(")
NOTEBOOK_HEAD = re.compile(r"^\W{0,20}\w{1,80} {2,}Traceback \(most recent call last\)\W*$")
"""IPython names the error before its traceback too, when the frames are not known yet."""
CPP_FRAME = re.compile(r"^[^\"\n]{0,120}?(?<![\w#])frame #\d{1,4}: ")
"""A line of PyTorch's C++ stack, which names classes of errors without being one."""
CUT_FRAME = re.compile(r"\.pyx?:\d{1,6} in\W*$")
"""A frame of rich's whose function stands in the next line."""
SOURCE = re.compile(
    r"^\W{0,8}(?:raise|assert|return(?! ?code)|except|if|logger\.\w+|warnings\.warn)\b"
    r"|\braise (?:[A-Za-z_][\w.]{0,80}\(|[A-Z]\w{0,80}$)"
    r"|^\s{0,40}f?\"[^\"]{0,300}\"\)?,?$|^\W{0,6}#(?!\[?error)(?!#\[)|│ *(?:❱ *)?\d{1,6} │|^-{2,}> ?\d{1,6} "
)
"""A line of source that a traceback quotes, which names errors without being one."""
EXCEPTION = re.compile(
    r"(?:^|[\s\]:*(>])(?P<type>(?:[A-Za-z_]\w{0,60}\.){0,8}[A-Z]\w{0,60}?(?:Error|Exception|Interrupt|Exit"
    r"|Failure|Failed|Timeout)"
    r"|(?:[a-z_]\w{0,60}\.){1,8}(?:exceptions?|errors?|exc)\.[A-Z]\w{0,60}|(?:(?<!.)|(?<=[\]):] ))Exception(?=: )"
    r"|(?:[a-z_]\w{0,60}\.){1,8}(?:BadZipFile|TimeoutExpired|BrokenProcessPool|OutOfResources|\w{0,40}NotFound"
    r"|\w{0,40}(?:Unavailable|Unsupported|Mismatch|Denied|Exceeded))(?=: ))"
    r"(?P<rest>\*{0,2}:[^\n]*|\([^)\n]{0,200}\)[^\n]*|\s*$)"
)
CRASH = re.compile(
    r"panicked at |C(?:heck|HECK) failed: |Segmentation fault|[Ss]egfault encountered|SIGSEGV|core dumped"
    r"|Fatal Python error|terminate called after throwing|Caught signal \d+"
    r"|exitcode\s*: -(?:6|11|7|8|4)\b|\b[Ee]xit [Cc]ode:? {1,12}(?:139|134|135|-11)\b|signal 11\b"
    r"|\bSIGABRT\b|Aborted \(|\bSignal: [A-Z][a-z ]{3,40} \(\d{1,2}\)$"
)
PHASE = re.compile(
    r"Loading (?:safetensors |pt )?checkpoint shards|Starting to load model|\*{5} Running (?:training"
    r"|Evaluation|Prediction)"
    r"|Saving model checkpoint to|[Cc]apturing CUDA graph|[Cc]apture cuda graph|[Ss]tarting profile run"
)
RESTART = re.compile(
    r"will restart worker group|torchrun restart|Requeued?\b|REQUEUED|Restarting (?:the )?(?:job|training|workers)"
    r"|={3,} ?(?:attempt|Attempt|ATTEMPT|restart) ?#?\d"
)
START = re.compile(
    r"vLLM API server version|Setting OMP_NUM_THREADS environment variable for each process|server_args=ServerArgs"
    r"|Starting elastic_operator with launch configs|^\+ (?:torchrun|accelerate launch|srun|deepspeed|vllm serve)\b"
)
"""Launches; one only begins another attempt where the one before has ended, for each node prints its own."""
END = re.compile(
    r"ChildFailedError|first observed failure|KeyboardInterrupt|CANCELLED|Engine core initialization failed"
    r"|Application shutdown complete|exits with return code|Shutting down|EADDRINUSE|Job step aborted|SystemExit"
)
MARK = re.compile(
    r"(?:[Ss]tep(?!Id)(?<![-_]step(?=s))|STEP|iteration|Iteration|iter|Iter|(?<![-_])epoch|Epoch"
    r"|global_step)\w{0,12}(?![\"']: ?\d{1,9}\.)[\s:=#\[\"']{1,12}(?P<step>\d{1,9})\b(?!\.\d{1,6} ON )"
    r"|(?<!\d)(?P<bar>[1-9]\d{0,8})/(?P<of>\d{1,9}) \[[^\]\n]{3,60}(?:it/s|s/it)"
)
SETUP_BAR = re.compile(
    r"(?:Loading|Fetching|Download|Map\b|Filter|Tokeniz|Generating \w+ split|[Cc]aptur|Convert|Packing"
    r"|Extracting|Applying|Saving|Writing|Upload|Resolving|Running tokenizer|Adding EOS|Truncating"
    r"|Pre-?processing|Creating|Unpacking|Validat|Sanity Check|Evaluating|Rollout|Warm)"
    r"[^|\n]{0,100}: {1,4}\d{1,3}%\|?"
)
"""A bar of what comes before the first step, which is no progress of the run."""
TOTAL = re.compile(r"(?<!\[ t )(?<!, p )(?P<step>\d{1,9}) ?/ {0,10}(?P<of>\d{1,9})")
GOOD_END = re.compile(
    r"'train_runtime'|train_runtime\s*=|\"train_runtime\"|Training completed\. Do not forget|done training in "
    r"|\"kind\":\"end\"|`Trainer\.fit` stopped: `max_(?:epochs|steps)"
    r"|(?:[Tt]raining|TRAINING|[Ff]ine-?tuning|[Rr]un|[Jj]ob|[Tt]est|[Bb]enchmark|[Ee]valuation|All"
    r"|all (?:ranks|tests|workers)) "
    r"(?:is |has |was |run |job |ranks |tests )?(?:complete|[Cc]ompleted|COMPLETED?|finished|done|succeeded"
    r"|successful|successfully|passed|ended (?:normally|successfully))\b"
    r"|[Ff]inished (?:training|successfully)|(?:exit|return)(?:ed)?(?: with)?(?: exit)?[ _-]?(?:code"
    r"|status):? ?0\b|\(code=0\)"
    r"|Out of bounds values : 0 OK|# Avg bus bandwidth|State: COMPLETED|Succeeded\b|[Ee]xiting with code 0"
    r"|worker group successfully finished|exiting program (?:at iteration"
    r"|after [\d.]{1,9} min)|SUCCEEDED|Successful requests:|agent_finish"
    r"|Reporting training SUCCESS|Received 0 from exiting process|Process \d+ exits successfully"
    r"|End time of running main|(?:eval|predict)_runtime +="
    r"|[Mm]odel (?:was |has been )?(?:successfully )?saved (?:to|in"
    r"|at)|Serving Benchmark Result|[Ss]aved (?:final|the final)"
)
NEGATED = re.compile(
    r"(?:\bnot|n.t|\bnever|\bcannot|\bbefore|\bif) (?:\w{1,20} ){0,3}(?:complet|finish|success|succeed|run"
    r"|passed|done|saved)"
    r"|\b(?:[Cc]lean-?(?:up|ing)|[Uu]pload\w*|[Ss]ync\w*|[Cc]opy(?:ing)?|rsync|[Aa]rchiv\w*|[Ee]pilog\w*|[Pp]rolog\w*)\b"
    r"[^\n]{0,80}(?:[Cc]omplete|[Ff]inish|[Ss]uccess|[Ss]ucceed|done|code|status)"
)
"""What turns a good end into its opposite, or tells that it is of a chore around the run."""
WEAK_END = re.compile(
    r"wandb: (?:\S{1,4} )?(?:View run |Synced |You can sync this run)|^(?:All )?[Dd]one ?[.!]{0,3}$"
    r"|^(?:[Tt]est|TEST|[Ff]inal|FINAL)\b[^\n]{0,40}(?:[Aa]ccuracy|[Pp]erplexity|F1|BLEU|ROUGE|[Ss]core)\b"
    r"[^\n]{0,20}[:=] ?\d"
    r"|^=+ (?:\d+ (?:skipped|deselected|xfailed|warnings?), )*\d+ passed\b(?![^=\n]*(?:failed|error))"
)
"""What a program says at its end, be it good or not: it counts where nothing went wrong."""
SERVING = re.compile(
    r"Application startup complete|Application shutdown complete|Uvicorn running on|The server is fired up"
    r"|HTTP/[12][.\d]{0,2}\" [24]\d\d"
    r"|\[GIN\] [\d/]{10} - [\d:]{8} \| [24]\d\d |llama runner started|server is listening on http|all slots are idle"
    r"|text_generation_router\S{0,40}: \S{1,80}: (?:Connected|Success)\b"
    r"|Started (?:GRPCInferenceService|HTTPService) at"
)
HEALTHY = re.compile(r"\|\s+Pass\s+\||ECC Errors|Xid Errors\s*: None|all GPUs? (?:are )?healthy")
CALM = re.compile(
    r"(?:^|[\s\[(|])(?:INFO|DEBUG|WARNING|WARN|NOTICE|info|warning)\b(?!\S*[Ee]rror)|\w*Warning: "
    r"|--\w[\w-]* \S+ +--\w|Namespace\(|\bargs?[:=]|\w\(.*\w+=.*\w+=.*\w+="
)
"""Ordinary messages, settings and command lines."""
NCCL_WARNS = re.compile(r"NCCL WARN|\.(?:cc|cu|h):\d{1,5} WARN ")
"""NCCL's word for an error; until 2.3 without its name."""
HEADED = re.compile(r"xception: Traceback \(most recent call last\)")
BODY = re.compile(
    r"^(?:  +\S|Traceback |(?:[A-Za-z_]\w{0,60}\.){0,8}[A-Z]\w{0,60}(?:Error|Exception)\b"
    r"|Exception: )"
)
"""The head of a traceback after other words in its line, and the lines under it, which have no such words."""
IGNORED = re.compile(r"Exception ignored in|^\W{0,4}Logging error ---")
"""What comes before a traceback that Python prints and goes on after."""
ADVICE = re.compile(
    r"\b(?:[Tt]ip|[Hh]int|TIP|HINT): |\b[Ii]f you (?:see|get|encounter|run into|hit)\b|\b[Ii]n case (?:of|you)\b"
)
"""What to do if something happens."""
NCCL_RANK = re.compile(r"\brank (?P<rank>\d{1,6}) nranks (?P<world>\d{1,6})")

SHUTDOWN = "[shutdown] "
"""vLLM's own word before each line of an orderly end; what breaks off after the first is part of it."""
PATTERNS = (
    r"\[shutdown\] ", " done", "xiting program", "xiting with", "lobal rank", "process rank",
    "Logging error ---", '"kind":"end"',
    "BadZipFile", "Expired: ", "OutOfResources", "NotFound: ", "Unavailable: ", "Unsupported: ", "Mismatch: ",
    "Denied: ", "Exceeded: ", r"\.exc\.",
    r'File "', r'File \\"', "File &quot;", r"\.py in ", r"\.py:1 in\b", r"\.py:1, in\b", r"\.pyx:1 in\b",
    "Traceback", "Error", "Exception", "Interrupt:?", "Failure", "Timeout",
    "Segmentation fault", "egfault",
    "SIGSEGV", "SIGABRT", r"Aborted \(", "Signal: ",
    "core dumped", "Fatal Python error", "terminate called", "Caught signal",
    r"exceptions?\.", r"errors?\.", "CANCELLED", "EADDRINUSE", "Shutting down", "Job step", "exitcode", "signal 11",
    "exit code", "exit status", "checkpoint shards", "Starting to load model", r"\*{5} Running",
    "Saving model checkpoint",
    "CUDA graph", "cuda graph", "profile run", "restart", "equeue", "REQUEUE", "API server version", "Restart",
    "ttempt", "Sending process",
    "Setting OMP_NUM", "torchrun", "accelerate launch", "deepspeed", "elastic_operator", "ServerArgs",
    "[Ss]tep", "STEP",
    "[Ii]ter", "[Ee]poch", "it/s", "s/it", "_runtime", "raining", "TRAINING", "ine-?tuning", "complete",
    "COMPLETE",
    "finished", " done", "xiting program", "xiting with", "lobal rank", "process rank",
    "succe", "Succe", "SUCCE", "passed", "Finished", "code=0", "Out of bounds values",
    "Avg bus bandwidth",
    "State: ", "saved", "Saved", "Serving Benchmark", "startup complete", "Uvicorn running", "fired up", "200 OK",
    r"HTTP/1", r"\[GIN\]", "llama runner", "is listening on", "slots are idle", "router", "SUCCESS", "Started ",
    "Received 0", "exits successfully", "End time", "wandb: ", "[Dd]one", "ccuracy",
    "erplexity", "BLEU", "ROUGE", " [Ss]core",
    r"\|\s+Pass", "ECC Errors", "nranks", "local_rank", r"rank      :", r"host      :",
    "first observed failure",
    "mbatch", "micro_batch", "batch_size", "batch size", "max_length", "max_seq", "cutoff_len", "max_model_len",
    "max-model-len", "max_num_seqs", "max-num-seqs", "tensor_parallel", "tensor-parallel", "accumulation",
    "learning_rate",
    r"\[rank", r"\[default", "heartbeat", "elements", "numel", "Numel", "FAILED", "Failed", "WARN", "FATAL",
    "fatal", "ERROR", "CRITICAL", "panicked", "Check fail", "CHECK fail", "Xid",
)  # fmt: skip
"""Literals of all the above (and of `numbers`), as patterns that `anchors` can read."""


@dataclass(frozen=True)
class Who:
    """Whoever a line says it is from; any part may be unknown."""

    key: str = ""
    """What tells this speaker's lines from others' in one file."""
    rank: int | None = None
    host: str | None = None
    gpu: str | None = None


_RANK = re.compile(
    r"\[(?:(?:rank|Rank|RANK)[ :=]?|default)(?P<a>\d{1,6})\]|\bRank (?P<b>\d{1,6})\]"
    r"|\(\w*[Ww]orker\w*[^)\n]{0,60}?\brank=(?P<c>\d{1,6})"
    r"|\(Worker(?:_[A-Z]+\d+)*_TP(?P<d>\d{1,5})|[ \[]TP(?P<e>\d{1,5})(?: EP\d+)?\]"
    r"|^(?:RANK|Rank|rank)[ _=:]{1,2}(?P<h>\d{1,6})\b|\brank[=:](?P<i>\d{1,6})\b"
    r"|\"rank\": ?(?P<j>\d{1,6})\b"
)
_OWN_RANK = re.compile(r"\[rank(?P<a>\d{1,6})\]|\[Rank (?P<b>\d{1,6})\]")
"""How PyTorch names its rank; what a launcher puts before it may count nodes, tasks or the ranks of one node."""
_LABEL = re.compile(
    r"^\s{0,4}(?P<a>\d{1,5}):(?=\s{1,12}\S)(?![^\n]{0,160}torch/distributed/elastic/)"
    r"|\[\d{1,4},(?:mpirank:)?(?P<b>\d{1,6})(?:,[\w-]{1,40})?\]<std"
)
"""How srun and mpirun label a task, which may be a launcher of several ranks: it counts where no rank is named."""
_PID = re.compile(r"\((?P<name>[A-Za-z_]\w{0,60}) pid=\d{1,9}(?:, ip=(?P<ip>[\d.:a-f]{3,45}))?\)")
_NCCL = re.compile(r"(?P<host>[\w.-]{1,200}):(?P<pid>\d{1,9}):\d{1,9} \[(?P<gpu>\d{1,3})\] ")
_HOST = re.compile(
    r"\[pod/(?P<a>[\w.-]{1,200})/|srun: error: (?P<b>[\w.-]{1,200}): task|\bON (?P<c>[\w.-]{1,200}) CANCELLED"
    r"|^(?P<d>(?![\w.]*(?:Error|Exception|Warning):)[\w.-]*[a-zA-Z][\w.-]*\d[\w.-]*): (?=\S)"
    r"|^[A-Z][a-z]{2} [ \d]\d [\d:]{8} (?P<e>[\w.-]{1,200}) kernel:"
    r"|\bnode=(?P<f>[\w.-]{1,200})|IP: (?P<g>[\d.]{7,15})"
)
_GPU = re.compile(
    r"GPU (?P<a>\d{1,3})\b|PCI:(?P<b>[0-9a-fA-F:.]{7,16})|GPU (?P<c>[0-9A-F]{8}:[0-9A-F:.]{7})"
    r"|cuda:(?P<d>\d{1,3})|GPU at PCI:(?P<e>\S{7,16})"
)
_HEAD_CHARS = 260


def _named(head: str) -> re.Match[str] | None:
    """The rank that a program names; a search only where its words stand, for this is asked of every line."""
    own = _OWN_RANK.search(head) if "[rank" in head or "[Rank" in head else None
    return own or _RANK.search(head)


def _label(head: str) -> re.Match[str] | None:
    """A launcher's label, which stands at the start except for mpirun's."""
    return _LABEL.search(head) if "<std" in head else _LABEL.match(head)


def other_rank(line: str) -> bool:
    """Whether a launcher labels `line` with another number than the rank that it names: then labels are no ranks."""
    label = _label(line[:_HEAD_CHARS])
    rank = _named(line[:_HEAD_CHARS]) if label else None
    return rank is not None and _first(rank) != _first(label)


def who(line: str, file_rank: int | None = None, file_host: str | None = None, *, labels: bool = True) -> Who:
    """Who says `line`, by a launcher's label too if `labels` are ranks, else whose file it stands in."""
    head = line[:_HEAD_CHARS]
    rank = _named(head) or (_label(head) if labels else None)
    pid, nccl = _PID.search(head), _NCCL.search(head)
    host = nccl["host"] if nccl else (pid["ip"] if pid and pid["ip"] else _first(_HOST.search(head)))
    key = nccl["host"] + nccl["pid"] if nccl else (pid[0] if pid else (rank[0] if rank else ""))
    number = _first(rank)
    return Who(key, int(number) if number else file_rank, host or file_host, nccl["gpu"] if nccl else None)


def unescaped(text: str) -> str:
    """A line with the quotation marks that JSON and HTML write otherwise."""
    return text.replace('\\"', '"').replace("&quot;", '"') if '\\"' in text or "&quot;" in text else text


def as_python_says(frame: str) -> str:
    """A frame of any of the forms of `FRAME` in Python's own."""
    found = FRAME.search(frame)
    file, line = (found["place"] or found["box"], found["number"] or found["row"]) if found else (None, None)
    if not found or not file:
        return frame
    return f'  File "{file}", line {line}, in {(found["name"] or found["def"] or "?").rpartition(".")[2]}'


def before_frame(frame: str) -> str | None:
    """What stands before a frame, and so before its line of source, without numbers; None where no source follows."""
    if CUT_FRAME.search(frame):
        return ""
    head, found, _ = frame.partition('File "')
    return "".join(one for one in head if not one.isdecimal()) if found else None


def gpu_of(text: str) -> str | None:
    """The GPU that a line names, by index or PCI id."""
    return _first(_GPU.search(text))


def _first(match: re.Match[str] | None) -> str | None:
    return next((group for group in match.groups() if group), None) if match else None


_TIMES = (
    re.compile(
        r"(?<!\d)(?:20\d\d[-/])(?P<mo>\d\d)[-/](?P<d>\d\d)[T _](?P<h>\d\d):(?P<mi>\d\d):(?P<s>\d\d(?:[.,]\d{1,6})?)"
    ),
    re.compile(r"[\[\s:][EWIF](?P<mo>\d{1,2}?)(?P<d>\d\d) (?P<h>\d\d):(?P<mi>\d\d):(?P<s>\d\d(?:\.\d{1,9})?)"),
    re.compile(r"(?<!\d)(?P<mo>\d\d)[-/](?P<d>\d\d)(?:/20\d\d)?(?: -)? (?P<h>\d\d):(?P<mi>\d\d):(?P<s>\d\d)"),
)
_MONTHS = {name: index for index, name in enumerate(
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), 1)}  # fmt: skip
_SYSLOG = re.compile(r"(?P<mo>[A-Z][a-z]{2}) (?P<d>[ \d]\d) (?P<h>\d\d):(?P<mi>\d\d):(?P<s>\d\d)")


def time_of(line: str) -> float | None:
    """Seconds since the start of the year that the head of a line says; the year is not looked at, zones neither."""
    head = line[:_HEAD_CHARS]
    for form in _TIMES:
        if found := form.search(head):
            return _seconds(int(found["mo"]), found)
    found = _SYSLOG.search(head)
    month = _MONTHS.get(found["mo"]) if found else None
    return _seconds(month, found) if found and month else None


def _seconds(month: int, found: re.Match[str]) -> float:
    clock = int(found["h"]) * 3600 + int(found["mi"]) * 60 + float(found["s"].replace(",", "."))
    return ((month - 1) * 31 + int(found["d"])) * 86_400 + clock


def clock(t: float | None) -> str | None:
    """What `time_of` gave, as `MM-DD HH:MM:SS`."""
    if t is None:
        return None
    days, seconds = divmod(t, 86_400)
    month, day = divmod(int(days) - 1, 31)
    minutes, second = divmod(int(seconds), 60)
    return f"{month + 1:02d}-{day + 1:02d} {minutes // 60:02d}:{minutes % 60:02d}:{second:02d}"
