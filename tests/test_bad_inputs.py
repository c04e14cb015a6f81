"""A list of bad inputs, each with words of its sentence: exit status 2, one line, and no traceback.

In a command line, ``{run}`` is a finished run, ``{here}`` the folder of the files that commands are given, ``{stack}``
stands for the options of a run's config and ``{sweep}`` for those of a sweep's.
"""

import os
import shlex
import shutil
from pathlib import Path

import pytest
from small_runs import CONFIGS, refused, stack, sweep_config

pytestmark = [pytest.mark.usefixtures("trains"), pytest.mark.usefixtures("unchecked_types")]

EARLIER = Path(__file__).parent / "earlier_run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of an earlier version, its checkpoint and text included, with its result."""
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    shutil.copytree(EARLIER, folder)
    shutil.copy(folder / "expected_result.json", folder / "run" / "result.json")
    return folder / "run"


@pytest.fixture(scope="module")
def options(tiny, finished, tmp_path_factory):
    """What stands in a case's command line for the words in braces."""
    sweep = sweep_config(tmp_path_factory.mktemp("sweep"), tiny)
    return {
        "stack": " ".join(f"--config={file}" for file in stack(tiny, "peer")),
        "sweep": f"sweep --config={sweep}",
        "run": str(finished),
    }


def table(text):
    """Cases of the lines of a text: a command, then `` | ``, then words of the sentence."""
    return [tuple(part.strip() for part in line.rsplit(" | ", 1)) for line in text.strip().splitlines()]


# What is bound to a run, by --set: the text of the binding, then words.
BINDINGS = table("""
PEEER.top_k=4 | PEEER PEER
Run.stepz=4 | stepz Run
Dense.depth=4 | Dense depth
PEER.tpo_k=4 | tpo_k top_k
AdamW.learning_rat=0.1 | learning_rat
TextTask.seqlen=4 | seqlen seq_len
Sharding.expertt=2 | expertt
normal.std=2 | std stddev
a/Run.seed=1 | a/ Run
up/Run.seed=1 | up/ Run
upp/normal.stddev=1.0 | upp/ normal
up/upper/normal.stddev=1.0 | up/upper
/Run.seed=1 | /Run
Run/.seed=1 | Run
Run.=1 | Run
.seed=1 | seed
Run.seed.x=1 | Run.seed
NUM_EXPERT=64 | NUM_EXPERT NUM_EXPERTS
Nothing=64 | Nothing
Run.model=@Nothing | Nothing
Run.model=@Dense | Dense
Run.model=@Transformer() | Transformer
Run.model=3 | Run.model 3
Run.model=None | Run.model
Run.model=@PEER | PEER
Run.optimizer=@AdamW | AdamW()
Run.optimizer=@Dense() | Dense
Run.optimizer=1.5 | optimizer 1.5
Run.task=@TextTask | TextTask()
Run.task='text' | Run.task 'text'
Run.eval_tasks=3 | eval_tasks 3
Run.eval_tasks=(3,) | eval_tasks 3
Run.sharding='rows' | Run.sharding 'rows'
Run.config='x' | config
Run.steps='many' | Run.steps 'many' int
Run.steps=2.5 | Run.steps 2.5 int
Run.steps=True | Run.steps True
Run.steps=[3] | Run.steps [3]
Run.steps=0 | steps=0
Run.steps=10000000000 | steps=10000000000 2147483647
Run.steps=-3 | steps=-3
Run.steps=1e999 | Run.steps
Run.steps=None | steps training_flops
Run.training_flops=1e9 | steps training_flops
Run.batch_size=0 | batch_size=0
Run.batch_size=-1 | batch_size=-1
Run.batch_size='4' | batch_size '4'
Run.batch_size=None | batch_size
Run.batch_size=%NOTHING | NOTHING
Run.batch_size=100000 | batch_size 100000
Run.batch_size=1000000000 | batch_size=1000000000 memory
Run.batch_size=10000000000000000000000000000 | batch_size memory
Run.accumulation=3 | accumulation=3
Run.accumulation=0 | accumulation=0
Run.seed=-1 | seed -1
Run.seed=4294967296 | seed 4294967296
Run.seed='a' | Run.seed 'a'
Run.seed=1.0 | Run.seed 1.0
Run.data_seed=-1 | data_seed -1
Run.data_seed='a' | Run.data_seed 'a'
Run.log_every=0 | log_every=0
Run.evaluate_every=-1 | evaluate_every=-1
Run.checkpoint_every=0 | checkpoint_every=0
Run.checkpoint_every=1.5 | checkpoint_every 1.5
Run.keep_checkpoints=0 | keep_checkpoints=0
Run.checked=2 | Run.checked 2
Run.checked='yes' | Run.checked 'yes'
Transformer.d_model='wide' | d_model 'wide'
Transformer.d_model=16.0 | d_model 16.0
Transformer.d_model=0 | d_model=0
Transformer.d_model=-16 | d_model=-16
Transformer.d_model=15 | d_model=15 num_heads
Transformer.d_model=10000000 | d_model=10000000 memory
Transformer.num_heads=5 | num_heads=5
Transformer.num_heads=0 | num_heads=0
Transformer.num_blocks=0 | num_blocks=0
Transformer.num_blocks=1000000 | num_blocks=1000000
Transformer.num_blocks=2.5 | num_blocks 2.5
Transformer.dtype='floaty' | dtype floaty
Transformer.dtype=%float33 | float33
Transformer.dtype=3 | dtype 3
Transformer.dtype='int32' | dtype int32
Transformer.param_dtype='int8' | param_dtype int8
Transformer.dtype=%float32x | float32x
Transformer.remat=3 | remat 3
Transformer.tie_embeddings='no' | tie_embeddings 'no'
Transformer.rope_theta=0.0 | rope_theta
Transformer.rope_theta=-1.0 | rope_theta
Transformer.rope_theta=1e-300 | rope_theta=1e-300 at least 1
Transformer.rope_theta='a' | rope_theta 'a'
Transformer.rope_theta=1e999 | rope_theta inf
Transformer.sparse_blocks=7 | sparse_blocks 7
Transformer.sparse_blocks='some' | sparse_blocks 'some'
Transformer.sparse_blocks='every 0' | sparse_blocks
Transformer.sparse_blocks='every x' | sparse_blocks
Transformer.sparse_blocks=(7,) | sparse_blocks 7
Transformer.sparse_blocks=(-1,) | sparse_blocks -1
Transformer.sparse_blocks=('a',) | sparse_blocks 'a'
Transformer.sparse_blocks=(1.5,) | sparse_blocks 1.5
Transformer.vocab_size=8 | vocab_size TextTask.vocabulary
Transformer.ffw=@Dense() | Dense
Transformer.ffw=None | Transformer.ffw
Transformer.ffw='Dense' | Transformer.ffw 'Dense'
Transformer.ffw=@AdamW | AdamW
Transformer.ffw=@normal | normal
Transformer.ffw=@Transformer | Transformer
Transformer.embed_init=3 | embed_init 3
Transformer.embed_init=@normal | normal
Transformer.embed_init=@Dense | Dense
embed/normal.stddev='a' | stddev 'a'
embed/normal.stddev=1e999 | stddev inf
embed/normal.stddev=-1.0 | stddev -1.0
UP_STDDEV='a' | stddev 'a'
PEER.num_experts=63 | num_experts=63 64
PEER.num_experts=0 | num_experts=0
PEER.num_experts=-4 | num_experts=-4
PEER.num_experts='64' | num_experts '64'
PEER.num_experts=1000000000000 | num_experts 2^31
PEER.num_experts=2147395600 | memory
PEER.top_k=65 | top_k=65
PEER.top_k=0 | top_k=0
PEER.top_k=2.5 | top_k 2.5
PEER.num_heads=0 | num_heads=0
PEER.num_heads=True | num_heads True
PEER.d_key=7 | d_key=7
PEER.d_key=0 | d_key=0
PEER.query_norm='b' | query_norm 'b'
PEER.score_activation='tanh' | score_activation 'tanh'
PEER.activation='x' | activation 'x'
PEER.implementation='fast' | implementation 'fast'
PEER.implementation=3 | implementation 3
PEER.share_sub_keys=5 | share_sub_keys 5
PEER.up_init=3 | up_init 3
PEER.d_model=8 | d_model Transformer.d_model
PEER.rngs=8 | rngs Run.seed
AdamW.learning_rate='fast' | learning_rate 'fast'
AdamW.learning_rate=-1.0 | learning_rate=-1.0
AdamW.learning_rate=None | learning_rate None
AdamW.learning_rate=1e999 | learning_rate inf
AdamW.clip_norm=-1.0 | clip_norm=-1.0
AdamW.b1=1.5 | b1 1.5
AdamW.b2=-0.1 | b2 -0.1
AdamW.eps=-1.0 | eps -1.0
AdamW.weight_decay=-1.0 | weight_decay -1.0
AdamW.warmup_steps=-1 | warmup_steps -1
AdamW.warmup_steps=1.5 | warmup_steps 1.5
AdamW.table_learning_rate={'down': 0.1} | table_learning_rate 'up'
AdamW.table_learning_rate={'down': 'a', 'up': 0.1} | table_learning_rate 'a'
AdamW.table_learning_rate='a' | table_learning_rate 'a'
AdamW.weight_decay=1e999 | weight_decay inf
AdamW.table_weight_decay=1e999 | table_weight_decay inf
Transformer.sparse_blocks=(0, 0) | sparse_blocks [0, 0]
Sharding.tables='diagonal' | tables 'diagonal'
Sharding.expert=0 | expert 0
Sharding.expert=2 | expert 2 devices
Sharding.fsdp=3 | fsdp 3
Sharding.data=-2 | data -2
Sharding.expert='a' | expert 'a'
TextTask.seq_len=1 | seq_len 1
TextTask.seq_len=0 | seq_len 0
TextTask.seq_len=32.0 | seq_len 32.0
TextTask.seq_len=1000000000 | seq_len=1000000000 memory
TextTask.vocabulary='no_such.model' | no_such.model
TextTask.vocabulary=3 | vocabulary 3
TextTask.corpus=3 | corpus 3
TextTask.corpus=@local_files | local_files()
TextTask.corpus=@nothing() | nothing
TextTask.max_train_tokens=-1 | max_train_tokens -1
TextTask.max_train_tokens=1.5 | max_train_tokens 1.5
TextTask.max_validation_tokens='a' | max_validation_tokens 'a'
TextTask.cache_dir=3 | cache_dir 3
TextTask.cache_dir='gs://bucket/cache' | gs://bucket
TextTask.cache_dir='~no_such_user/x' | ~no_such_user
local_files.path='/no/such/place' | /no/such/place
local_files.path=3 | path 3
local_files.path='gs://bucket/text' | gs:
local_files.path='http://x/text' | http:
local_files.validation_share=2.0 | validation_share
local_files.validation_share='a' | validation_share 'a'
local_files.validation_share=-0.5 | validation_share
Run.steps | Run.steps NAME=VALUE
=5 | =5
Run.steps= | Run.steps=
Run.steps=five | five
Run.steps=[5 | [5
Run.steps=(5 | (5
Run.steps=1+1 | 1+1
Run.steps=__import__('os') | __import__
Run.steps=@ | Run.steps=@
Run.steps=% | Run.steps=%
Run.steps={1: | Run.steps
Run.steps='a | Run.steps
import os | import
include 'x.gin' | include
""")


@pytest.mark.parametrize(("binding", "words"), BINDINGS, ids=[binding[:40] for binding, _ in BINDINGS])
def test_binding(tmp_path, run_cli, options, binding, words):
    arguments = ["train", *shlex.split(options["stack"])]
    if binding != "Run.steps=None" and not binding.startswith("Run.steps"):
        arguments.append("--set=Run.steps=2")
    outcome = run_cli(*arguments, "--set", binding, "--workdir", tmp_path / "run", "--quiet")
    refused(outcome, f"{words}")
    assert not (tmp_path / "run" / "result.json").exists()


# Bindings of a sweep.
OF_SWEEPS = table("""
Sweep.budgets=(1e999,) | Sweep.budgets inf
Sweep.budgets=() | Sweep.budgets
Sweep.budgets=(-1.0,) | Sweep.budgets
Sweep.budgets=('a',) | Sweep.budgets 'a'
Sweep.budgets='1e9' | Sweep.budgets
Sweep.budgets=1e9 | Sweep.budgets
Sweep.budgets=(1.0,) | one step
Sweep.seeds=0 | Sweep.seeds
Sweep.seeds=('a',) | Sweep.seeds 'a'
Sweep.seeds=(-1,) | seed -1
Sweep.seeds=(1.5,) | Sweep.seeds 1.5
Sweep.methods=('dens',) | dens
Sweep.methods='dense' | Sweep.methods
Sweep.methods=('a/b',) | a/b
Sweep.methods=('',) | Sweep.methods
Sweep.methods={'dense': 3} | Sweep.methods 3
Sweep.methods={'dense': {'Dens.width': 3}} | Dens
Sweep.sizes={'a': 3} | Sweep.sizes 3
Sweep.sizes={} | Sweep.sizes
Sweep.sizes={'a b': {}} | 'a b'
Sweep.sizes={'a': {'Transformer.d_model': 'x'}} | d_model 'x'
Sweep.sizes_at={2e8: ('d17',)} | d17
Sweep.sizes_at={1e8: ('d8',)} | sizes_at 1e+08
Sweep.sizes_at={2e8: 'd8'} | sizes_at 'd8'
Sweep.configs=('no_such.gin',) | no_such.gin
Sweep.configs='base.gin' | Sweep.configs
Sweep.layers='no_such_folder' | no_such_folder
Sweep.method_files={'x': 'peer'} | method_files 'x'
Sweep.cross={'PEER.top_k': 3} | cross PEER.top_k 3
Sweep.cross={'PEER.top_k': ()} | cross PEER.top_k
Sweep.cross={'PEER.tpo_k': (1, 2)} | tpo_k
Sweep.cross={'Run.seed': (1, 2)} | Run.seed seeds
Sweep.zip={'PEER.top_k': (1, 2), 'PEER.d_key': (2,)} | zip
Sweep.bindings={'Run.steps': 3} | Run.steps budgets
Sweep.bindings={'PEEER.x': 3} | PEEER
Sweep.bindings={3: 3} | Sweep.bindings 3
Sweep.bindings='a' | Sweep.bindings 'a'
Sweep.baseline='Dense' | baseline 'Dense'
Sweep.rates_at=0 | rates_at
Sweep.rate_exponents={'AdamW.learning_rate': 0.5} | rates_at
Sweep.rate_exponents={'AdamW.learning_rate': 'a'} | rate_exponents 'a'
Sweep.min_steps=1000000 | min_steps
Sweep.min_steps='a' | min_steps 'a'
Sweep.max_epochs=1e-9 | max_epochs
Sweep.max_epochs='a' | max_epochs 'a'
Sweep.nothing=3 | nothing
a/Sweep.seeds=(0,) | a/
Run.seed='a' | Run.seed seeds
Run.stepz=3 | stepz
PEER.top_k=1000 | top_k=1000
""")


@pytest.mark.parametrize(("binding", "words"), OF_SWEEPS, ids=[binding[:40] for binding, _ in OF_SWEEPS])
def test_binding_of_a_sweep(run_cli, options, binding, words):
    arguments = [*shlex.split(options["sweep"]), "--dry-run", "--no-estimate"]
    refused(run_cli(*arguments, "--set", binding), words)


# Whole commands.
COMMANDS = table("""
frobnicate | frobnicate --help
--frobnicate | --frobnicate
train | --workdir
train {stack} | --workdir
train {stack} --workdir | --workdir
train {stack} --workdir {here}/w --stepz 3 | --stepz
train {stack} --workdir gs://bucket/run | gs://bucket
train {stack} --workdir file:///x | file:
train {stack} --workdir http://x/y | http:
train {stack} --workdir s3://x/y | s3:
train {stack} --workdir /proc/x --set Run.steps=2 --quiet | /proc/x
train {stack} --workdir {here}/w --import no_such_module | no_such_module
train {stack} --workdir {here}/w --import os.path.nothing | os.path.nothing
train {stack} --workdir {here}/w --import ../x | ../x
train {stack} --workdir {here}/w --import "" | --import
train {stack} --workdir {here}/w --num-processes 2 | coordinator
train {stack} --workdir {here}/w --num-processes 0 | --num-processes 0
train {stack} --workdir {here}/w --num-processes a | --num-processes a
train {stack} --workdir {here}/w --coordinator x:1 --num-processes 2 --process-id 2 | process-id 2
train {stack} --workdir {here}/w --coordinator x --num-processes 2 --process-id 0 | coordinator HOST:PORT
train {stack} --workdir {here}/w --coordinator x:99999 --num-processes 2 --process-id 0 | coordinator 99999
train --config {here}/no.gin --workdir {here}/w | no.gin exist
train --config {here} --workdir {here}/w | file
train --config /dev/null --workdir {here}/w | /dev/null file
train --config {here}/fifo --workdir {here}/w | fifo file
train --config "" --workdir {here}/w | --config
train --config gs://bucket/a.gin --workdir {here}/w | gs:
train --config {here}/cyclic.gin --workdir {here}/w | cyclic.gin itself
train --config {here}/cycle_a.gin --workdir {here}/w | itself
train --config {here}/latin.gin --workdir {here}/w | latin.gin
train --config {here}/nul.gin --workdir {here}/w | nul.gin
train --config {here}/deep.gin --workdir {here}/w | deep.gin
train --config {here}/digits.gin --workdir {here}/w | digits.gin
train --config {here}/twice.gin {stack} --workdir {here}/w | twice.gin
train --config {here}/includes_folder.gin --workdir {here}/w | file
train --config {here}/includes_nothing.gin --workdir {here}/w | nothing.gin
train --config {here}/imports.gin --workdir {here}/w | no_such_module
train --config {here}/python.gin --workdir {here}/w | python.gin
train --config {here}/empty.gin --workdir {here}/w | Run
train --config {here}/long_name.gin --workdir {here}/w | long_name.gin
prepare {stack} --set local_files.path='{here}/empty.txt' | empty.txt
prepare {stack} --set local_files.path='{here}/nul.gin' | nul.gin
prepare {stack} --workdir x | --workdir
evaluate | --workdir
evaluate --workdir {here}/nothing | nothing
evaluate --workdir {here} | config.gin
evaluate --workdir {here}/empty.txt | empty.txt
evaluate --workdir gs://bucket/run | gs:
evaluate --workdir {run} --data {here}/no.gin | no.gin
evaluate --workdir {run} --data {here} | file
evaluate --workdir {run} --data {sweeps}/lr.gin | --data lr.gin
evaluate --workdir {run} --checkpoint 3 | '3' 4
evaluate --workdir {run} --checkpoint first | 'first'
evaluate --workdir {run} --checkpoint -1 | -1
evaluate --workdir {run} --checkpoint 99999999999999999999999 | 9999
evaluate --workdir {run} --batch-size 0 | --batch-size 0
evaluate --workdir {run} --batch-size a | --batch-size a
evaluate --workdir {run} --batch-size 1000000000 | --batch-size 1000000000 memory
evaluate --workdir {run} --batch-size 100000000000000000000000 | memory
evaluate --workdir {run} --set PEER.top_k=a | PEER.top_k
evaluate --workdir {run} --set TextTask.vocabulary='no.model' | no.model
evaluate --workdir {run} --set PEER.num_experts=64 | shape
evaluate --workdir {run} --set Transformer.d_model=32 | shape
generate | --workdir
generate --workdir {here} | config.gin
generate --workdir {run} --max-new-tokens 0 | --max-new-tokens 0
generate --workdir {run} --max-new-tokens x | --max-new-tokens x
generate --workdir {run} --max-new-tokens 1000000000 | --max-new-tokens memory
generate --workdir {run} --max-new-tokens 100000000000000000000 | --max-new-tokens memory
generate --workdir {run} --prompt {long} | --prompt memory
generate --workdir {run} --temperature -1 | --temperature -1
generate --workdir {run} --temperature nan | temperature nan
generate --workdir {run} --temperature inf | temperature inf
generate --workdir {run} --temperature x | --temperature x
generate --workdir {run} --top-p 0 | top_p
generate --workdir {run} --top-p 1.5 | top_p
generate --workdir {run} --top-p nan | top_p nan
generate --workdir {run} --seed -1 | --seed -1
generate --workdir {run} --seed 4294967296 | --seed 4294967296
generate --workdir {run} --seed 1.5 | --seed 1.5
generate --workdir {run} --checkpoint x | 'x'
generate --workdir {run} extra | extra
sweep | --workdir
sweep --workdir {here}/w | --config
{sweep} | --workdir
{sweep} --workdir gs://bucket/x | gs:
{sweep} --dry-run --workers 0 | --workers 0
{sweep} --dry-run --workers x | --workers x
{sweep} --workdir {here}/empty.txt | empty.txt
sweep --config {here}/no.gin --dry-run | no.gin
sweep --config {here} --dry-run | file
sweep {stack} --dry-run | Sweep
sweep --config {here}/empty.gin --dry-run | Sweep
report | DIR
report {here}/nothing | nothing
report {here} | result.json
report {here}/empty.txt | empty.txt
report gs://bucket/x | gs:
report {run} --out gs://bucket/x | gs:
report {run} --out {here}/empty.txt | empty.txt
report {run} --out /proc/x | /proc/x
plan {stack} | --device
plan {stack} --device abacus | --device abacus h100
plan --device h100 | --config
plan {stack} --device h100 --set Run.steps=2 --mesh data | --mesh data
plan {stack} --device h100 --set Run.steps=2 --mesh rows=2 | rows
plan {stack} --device h100 --set Run.steps=2 --mesh data=2,data=2 | twice
plan {stack} --device h100 --set Run.steps=2 --mesh data=0 | data 0
plan {stack} --device h100 --set Run.steps=2 --mesh data=x | data=x
plan {stack} --device h100 --set Run.steps=2 --mesh data=3 | 3
plan {stack} --device h100 --set Run.steps=2 --mesh data=4 --devices 3 | 4 3
plan {stack} --device h100 --set Run.steps=2 --mesh expert=7 | 7
plan {stack} --device h100 --set Run.steps=2 --mesh expert=1000000000000 | 1000000000000
plan {stack} --device h100 --set Run.steps=2 --mesh expert=4 --set PEER.num_experts=1 --set PEER.top_k=1 | rows 4
plan {stack} --device h100 --devices 0 | --devices 0
bench | op
bench ops | ops op
bench op --only nothing | nothing
bench layer --only expert_mix | expert_mix
bench op --tokens 0 | --tokens
bench op --tokens x | --tokens x
bench op --tokens -5 | --tokens
bench op --d-model 0 | --d-model
bench op --num-experts 63 | --num-experts 63 64
bench op --num-experts 1000000000000 | --num-experts memory
bench layer --num-experts 1000000000000 | num_experts 2^31
bench step --num-experts 1000000000000 | num_experts 2^31
bench layer --num-experts 2147395600 | --num-experts memory
bench step --num-experts 2147395600 | --num-experts memory
bench op --tokens 1000000000000 | memory
bench op --heads 0 | --heads
bench op --top-k 0 | --top-k
bench op --top-k 100 --num-experts 16 | top_k
bench op --dtype int8 | --dtype int8
bench op --table-dtype x | --table-dtype x
bench op --implementation fast | fast
bench op --repeats 0 | --repeats
bench step --tokens 300 | --tokens 300
bench op --against numpy | --against numpy
bench op --against pytorch | layer
bench op --quick --out gs://bucket/x | gs:
bench op --quick --out {here}/empty.txt | empty.txt
bench layer --import no_such_module | no_such_module
sentencepiece {stack} | --model
sentencepiece {stack} --model {here}/a.model --vocab-size 3 | --vocab-size 3
sentencepiece {stack} --model {here}/a.model --vocab-size x | --vocab-size x
sentencepiece {stack} --model {here}/a.model --vocab-size 100000000 | vocab
sentencepiece {stack} --vocab-size 300 --model {here} | {here}
sentencepiece {stack} --model gs://b/a.model | gs:
""")
FILES = {
    "empty.txt": b"",
    "empty.gin": b"",
    "cyclic.gin": b"include 'cyclic.gin'\n",
    "cycle_a.gin": b"include 'cycle_b.gin'\n",
    "cycle_b.gin": b"include 'cycle_a.gin'\n",
    "latin.gin": b"# caf\xe9\nRun.steps = 2\n",
    "nul.gin": b"Run.steps = \x00\n",
    "deep.gin": b"Run.steps = " + b"(" * 5000 + b"\n",
    "digits.gin": b"Run.steps = " + b"9" * 5000 + b"\n",
    "twice.gin": b"Run.steps = 2 3\n",
    "includes_folder.gin": b"include '.'\n",
    "includes_nothing.gin": b"include 'nothing.gin'\n",
    "imports.gin": b"import no_such_module\n",
    "python.gin": b"for i in range(3):\n    print(i)\n",
    "long_name.gin": b"A" * 5000 + b".b = 3\n",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder with the files of the commands."""
    folder = tmp_path_factory.mktemp("here")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[command[:60] for command, _ in COMMANDS])
def test_command(here, finished, monkeypatch, run_cli, options, command, words):
    monkeypatch.chdir(finished.parent)  # its config names its text from there
    given = options | {"here": str(here), "sweeps": str(CONFIGS / "sweeps"), "long": "a" * 120_000}
    outcome = run_cli(*shlex.split(command.format(**given)))
    refused(outcome, words.format(**given))
