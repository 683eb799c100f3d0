"""Every key of the pipeline with its default and its reason. Recipes start from this config and override some keys.

Tasks are named sections under `tasks`; a recipe adds those it needs. Data files that begin with "bundled/" are shipped
with the package.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # The model: folder of a Hugging Face checkpoint, .gguf file, hub id, or "bundled" for the tiny model of the package.
    config.model = "bundled"
    config.revision = ""  # branch, tag or commit of a hub id (empty: its main branch); a commit pins the weights
    # Attributes of config.json that are not understood, and of which you know that they change nothing; else they raise.
    config.ignore = ()
    config.dtype = "float32"  # of the parameters in every stage but training; bfloat16 halves the memory
    config.seed = 0
    config.kernel = "auto"  # of attention: auto is the fastest for the device; or plain, blocked, cudnn, splash
    config.batch_size = 32  # rows per forward pass where no gradient is taken
    config.cpu_devices = 1  # most devices to make of a CPU's cores; each holds the parameters (sharding.split_cpu)
    # Devices per axis; -1 takes all that the others leave. data and fsdp split the rows, fsdp the weights too, tensor
    # heads and MLPs, context the positions of long rows. Where fsdp splits weights, work without gradients uses another
    # mesh of the same devices, with one device on the fsdp axis (sharding.decoding_mesh).
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})
    config.timings = False  # print how long each stage compiled, ran and waited; its page has that in any case
    # Compiled programs are kept for later runs: in a folder (empty: one in the user's cache directory; "off": nowhere) of at
    # most so many GiB, as long as they were used in so many days.
    config.programs = ConfigDict({"folder": "", "gib": 4.0, "days": 30.0})
    config.distributed = None  # several hosts: None joins those that the environment names, True must find some

    config.prompt = ConfigDict()
    config.prompt.template = "{context}\n\n{question}"
    config.prompt.chat = True  # put the prompt into the tokenizer's chat template; None: if it has one
    config.prompt.plain_template = "{context}\n\nQuestion: {question}\nAnswer:"  # where chat is None and there is none
    config.prompt.template_kwargs = ConfigDict()  # passed to the chat template, such as enable_thinking=False

    config.tasks = ConfigDict()

    # Detection: Wu et al. 2404.15574, as RetMask uses it.
    config.detect = ConfigDict()
    config.detect.task = "detect"
    config.detect.scores = None  # a file of head scores, in any known form, to use instead of detecting
    config.detect.max_new_tokens = 50  # the published limit
    config.detect.threshold = 0.1  # RetMask: 0.1 for Llama-3.1, 0.05 for Qwen3 and Olmo-3
    config.detect.top_k = None  # instead of the threshold (which is then None)
    config.detect.released = False  # True: the published detector with its accumulating score

    # Knock-out: recall with heads masked.
    config.knockout = ConfigDict()
    config.knockout.tasks = ()
    config.knockout.draws = 5  # random control sets of each kind: one draw can mislead
    config.knockout.activity_windows = 16  # texts on which the activity of a head is measured
    config.knockout.seed = 0
    # What a masked head writes: zero, its mean over text, query (the mean of all keys), or query_mean (what its mean query
    # over text reads).
    config.knockout.modes = ("zero",)
    config.knockout.mode_draws = 2  # random sets of each kind in all modes but the first, and in curves
    # Sizes of the sets whose recall makes a curve on the first task, best heads first: numbers of heads, or (floats)
    # shares of the retrieval heads.
    config.knockout.curve = ()
    config.knockout.minimal = None  # search the smallest set that lowers recall to this share of the unmasked model's

    # Rotary pairs: recall with the retrieval heads losing some of their rotary pairs.
    config.rope = ConfigDict()
    config.rope.tasks = ()
    config.rope.pairs = ()  # numbers of rotary pairs; empty: an eighth, a quarter and a half of them
    config.rope.draws = 3
    config.rope.seed = 0
    config.rope.sites = ("rotary",)  # also projection: zeroed in q_proj and k_proj, as arXiv 2606.21249 did
    config.rope.utility = False  # also mask the pairs that each head's query projection writes least and most
    config.rope.windows = 0  # parts of the spectrum that are masked one after the other; arXiv 2606.21249 has 8
    config.rope.coverage = ()  # shares of the retrieval heads, best first, that lose pairs
    config.rope.patches = False  # also mask pairs in one retrieval head at a time
    config.rope.patch_pairs = None  # pairs masked for coverage and patches; None: an eighth, as arXiv 2606.21249
    # For each number of pairs, so many sets of other pairs that carry as much of the variance of q.k.
    config.rope.matched = 0
    config.rope.text = False  # also measure the loss on plain text

    # Contrastive responses: RetMask samples at temperature 0.6, top_p 1, up to 2048 tokens.
    config.pairs = ConfigDict()
    config.pairs.prompts = ""  # .jsonl or .txt (or .gz), a glob of them, or tfds:NAME (see retmask_jax/data/prompts.py)
    config.pairs.prompts_split = "train"  # of a TFDS set; a slice such as train[:10%] works too
    config.pairs.prompts_field = None  # where each record has its prompt; None: messages, conversation or prompt
    # What a prompt must have to be asked: ("messages_without",) takes those alone that the arm no_fact can be trained on, so
    # that all arms get the same prompts. Others are left out and counted.
    config.pairs.prompts_having = ()
    config.pairs.n_prompts = 294_000
    config.pairs.temperature = 0.6
    config.pairs.top_p = 1.0
    config.pairs.max_new_tokens = 2048
    # Rows that are decoded together. None: as many as fill the device's memory by the compiler's report, or batch_size
    # where the device does not say how much it has. A step reads all weights once, however many rows there are.
    config.pairs.batch_size = None
    config.pairs.template_kwargs = ConfigDict()  # added to those of prompt, such as enable_thinking=True

    # Answers from OpenAI-compatible servers instead of this process: {"normal": url, "retmask": url}; a control has one
    # server per training seed, "any_layer-0". These and how they are reached may change between runs of a work
    # directory.
    config.pairs.endpoints = ConfigDict()
    config.pairs.endpoint_model = ""  # the name under which servers know the model (empty: config.model)
    config.pairs.concurrency = 64  # requests in flight for each server
    config.pairs.timeout = 600.0  # seconds for one answer
    config.pairs.retries = 8  # after 1, 2, 4, ... seconds: about four minutes, as a server takes to come back

    # Training: RetMask's DPO.
    config.train = ConfigDict()
    config.train.arms = ("retmask",)  # what is trained; the arms are listed in retmask_jax/stages/arms.py
    config.train.seeds = (0,)
    config.train.loss = "sigmoid"  # or ipo, hinge, simpo; see retmask_jax/training/losses.py
    config.train.beta = 0.1
    config.train.label_smoothing = 0.0  # share of pairs whose preference is assumed to be the wrong way round
    config.train.gamma = 0.0  # margin of simpo; its authors take 0.3 to 1.6 with beta 2 to 2.5
    config.train.per_token = False  # divide log-probabilities by the answer's length; simpo always does
    config.train.nll_weight = 0.0  # weight of the chosen answer's loss per token, which is added (arXiv 2404.19733)
    config.train.contrast_strength = 0.5  # of the arm "contrast": how far it goes beyond the normal distribution
    config.train.learning_rate = 5e-7
    config.train.final_learning_rate = 5e-8  # where the cosine ends
    config.train.warmup = 0.1  # share of the steps
    config.train.steps = 1148  # 2 epochs of 294K pairs
    config.train.batch_size = 512  # pairs per update
    config.train.microbatch_size = 16  # pairs per forward and backward pass; gradients are accumulated
    # Which heads are trained: "all" (and all other parameters), "retrieval", "others" (all but these), "matched" (as many
    # others, of the same layers), or a file: a JSON list of [layer, head], or head scores, of which those count that
    # detect.threshold or detect.top_k choose.
    config.train.heads = "all"
    config.train.mlp = False  # where only some heads are trained: whether the MLPs and experts of all layers are, too
    config.train.lora_rank = 0  # of adapters, which are trained instead of the weights and merged on export; 0: none
    config.train.lora_alpha = 16.0  # adapters are scaled by alpha / rank
    config.train.lora_targets = ("q", "k", "v", "o", "gate", "up", "down")  # layers that have adapters
    config.train.b1 = 0.9
    config.train.b2 = 0.95
    config.train.eps = 1e-8
    config.train.weight_decay = 0.1
    config.train.clip = 1.0
    config.train.max_tokens = 1024  # of prompt and answer together; longer answers are cut
    config.train.max_prompt_tokens = 512  # longer prompts keep their end
    config.train.compute_dtype = "bfloat16"  # the weights stay float32: updates of 5e-7 vanish in bfloat16
    config.train.first_moment_dtype = "float32"  # of Adam; bfloat16 saves 2 bytes a weight
    config.train.remat = True  # recompute blocks in the backward pass: less memory, a third more work
    config.train.widths = 4  # prompts and answers are padded to one of so many shapes; each is a compiled program
    config.train.reference_batch_size = 32  # pairs per forward pass of the start model
    config.train.checkpoint_every = 50  # steps
    config.train.keep = 2  # newest checkpoints that are kept, besides the one with the lowest loss
    # Where checkpoints go instead of the work directory: a folder, or a bucket (gs://NAME/FOLDER), to which Orbax
    # writes without a mount.
    config.train.checkpoint_folder = ""
    config.train.examples = 0  # cases of the first of eval.tasks with a context that are shown, before and after
    config.train.profile = ()  # (first step, step after the last) of a trace for TensorBoard or Perfetto
    # Project of Weights & Biases, if installed; metrics.jsonl and tensorboard/ are always written.
    config.train.wandb = ""

    # The learning rate (`retmask rates`): the arm retmask, with the first of train.seeds, at each of these rates. They are
    # measured on tasks that eval does not report, and on the text after that of the losses.
    config.rates = ConfigDict()
    config.rates.learning_rates = ()  # as train.learning_rate; the last one keeps its ratio to the first
    config.rates.tasks = ()
    config.rates.most_loss = 0.05  # nats by which the loss on plain text may rise at the rate that is chosen

    config.eval = ConfigDict()
    config.eval.tasks = ()
    config.eval.grids = ()  # tasks shown as heat maps over length and depth
    config.eval.masked = False  # also evaluate the start model with its retrieval heads masked
    # Also the start model's answers decoded by contrast with that masked model (DeCoRe, arXiv 2410.18860), which trains
    # nothing: its alpha, a number above 0, or "entropy" as in the paper. None: not.
    config.eval.contrast = None
    config.eval.contrast_threshold = 0.1  # least probability of a token that may be chosen, as a share of the largest
    # Other models for comparison (`retmask eval --compare`): {name: folder or hub id}.
    config.eval.models = ConfigDict(allow_dotted_keys=True)

    # The causal study (`retmask study`): further stages besides detect, knockout and rope.
    config.detectors = ConfigDict()
    # Those of retrieval; besides them there are induction and previous_token, which score heads on repeated random tokens.
    # Units differ, so detectors are compared by their order of the heads and by their best heads.
    config.detectors.names = (
        "copy",  # of `detect`: heads whose strongest key is the token that the model then copies
        "copy_forced",  # the same, read from the finished answer in one pass
        "copy_position",  # the strongest key is the next token of the gold answer
        "argmax",  # the strongest key of the prompt's last position lies in the answer
        "mass",  # attention mass in the answer
        "query_focused",  # QRHead: attention mass from the question to the needle
        "logit",  # LOCOS: what a head adds to the logit of the answer's token
        "gradient",  # how fast the gold answer's log-probability falls as a head is masked
    )
    config.detectors.cases = None  # of detect.task, spread evenly; None: all, and copy is not decoded again
    config.detectors.top_k = None  # heads compared and masked for each detector; None: as many as detect found
    config.detectors.null_query = "N/A"  # of query_focused, as in QRHead: a question that asks for nothing
    config.detectors.seeds = ()  # more seeds of detect.task: how far a detector repeats itself on other cases
    config.detectors.seed_names = ("copy_position", "mass")  # run on these seeds: they read each case only once

    # Lists of heads, whoever made them, compared by what ablating them does (`retmask arena MODEL a.json b.yaml`).
    config.arena = ConfigDict()
    config.arena.files = ()  # of heads, in any of the forms that retmask_jax/heads/README.md lists
    config.arena.detectors = config.detectors.names  # whose lists are compared with those of files
    config.arena.detect = None  # the task that detectors run on; None: detect.task
    config.arena.cases = None  # of it, spread evenly; None: all
    # How many heads of each list are ablated, in turn; empty: as many as the first detector finds and the shortest list has.
    config.arena.heads = ()
    config.arena.task = None  # whose cases are answered; None: the first of knockout.tasks
    config.arena.modes = ("zero", "mean", "query", "query_mean")  # as knockout.modes
    config.arena.draws = 1  # of each kind of control
    config.arena.seed = 0
    config.arena.windows = None  # of the text, on which losses are measured; None: text.windows

    # What a model can still do on a budget of keys: KV heads that are kept for a list's best heads see all keys, and all
    # others stream (`retmask budget MODEL a.json b.yaml`).
    config.budget = ConfigDict()
    config.budget.files = ()  # as arena.files
    config.budget.detectors = ("copy", "mass")  # whose lists are compared with those of files
    config.budget.detect = None  # the task that detectors run on; None: detect.task
    config.budget.cases = None  # of it, spread evenly; None: all
    config.budget.kept = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # KV heads: shares of all (floats), or numbers
    config.budget.sink = 4  # first tokens that streaming heads see
    config.budget.window = 256  # last keys that they see
    config.budget.tasks = ()  # whose cases are answered, longer than both; empty: the first of knockout.tasks
    config.budget.draws = 3  # random lists
    config.budget.seed = 0
    config.budget.length = 1024  # tokens of a text on which the loss is measured; None: text.length
    config.budget.windows = 8  # such texts; None: text.windows

    config.utility = ConfigDict()
    config.utility.permutations = 10_000  # of heads within layers: p-values down to 1e-4
    config.utility.resamples = 10_000  # of layers
    config.utility.seed = 0

    config.theta = ConfigDict()
    config.theta.factors = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the RoPE base; each needs another compiled program
    config.theta.tasks = ()  # empty: the first of knockout.tasks
    config.theta.cases = 60  # of detect.task, spread evenly, on which heads are counted at each base; None: all
    config.theta.detector = "copy"  # the score for which detect.threshold is meant

    # Which heads retrieve at each token of an answer, and for how many tokens in a row.
    config.per_step = ConfigDict()
    config.per_step.cases = 60  # of detect.task, spread evenly; None: all
    config.per_step.seed = 1000  # of the cases instead of detect.task's: other cases than those the heads were found on

    # Training dynamics: folders, globs of folders (runs/x/step_*) or owner/name@revision; empty: left out.
    config.dynamics = ConfigDict()
    config.dynamics.checkpoints = ()
    config.dynamics.detector = "copy_position"  # reads the gold answer: early checkpoints answer nothing right
    config.dynamics.threshold = None  # None: detect.threshold, or 0.1 where heads are chosen by top_k
    config.dynamics.cases = None  # of detect.task, spread evenly; None: all
    config.dynamics.task = None  # recall with and without the best heads; None: the first of knockout.tasks

    # Loss on plain text: the general cost of a mask or a training.
    config.text = ConfigDict()
    config.text.file = ""
    config.text.length = 256
    config.text.windows = 32

    config.suites = _suites()

    config.headlines = ()  # names of numbers in the table at the end of `run`; summary.json has all numbers
    return config


def _suites() -> ConfigDict:
    """Suites of tasks that `eval` runs besides eval.tasks, before and after training.

    Each is off until its first key is set. Lengths are in tokens of the model, new ones included; in niah they are
    those of the prompt alone, as in `tasks`.
    """
    suites = ConfigDict()
    suites.ruler = ConfigDict()  # arXiv 2404.06654, with our wording of the prompts
    suites.ruler.tasks = ()  # off; names of retmask_jax/evals/suites/ruler.py, such as niah_multikey_2, vt or cwe
    suites.ruler.lengths = (4096, 8192, 16384, 32768, 65536, 131072)  # the paper's
    suites.ruler.n = 500  # samples of each task and length, as the paper has; 100 give +-10 points
    suites.ruler.seed = 0
    suites.ruler.essay = ""  # text of the needle tasks in an essay; a longer context repeats it
    suites.ruler.qa_1 = ""  # questions on documents: SQuAD's JSON, or a form of retmask_jax/evals/suites/questions.py
    suites.ruler.qa_2 = ""  # HotpotQA's JSON, or the same

    suites.niah = ConfigDict()  # ROUGE-1 recall over length and depth
    suites.niah.needles = ""  # off; JSONL of needle, question, answer
    suites.niah.haystack = ""
    suites.niah.shortest = 1000
    suites.niah.longest = 128_000  # leaves room for the answer in a context of 131072
    suites.niah.n_lengths = 40  # evenly spaced; 40 x 10 is the usual heat map
    suites.niah.n_depths = 10
    suites.niah.per_cell = 1  # the usual single case; with more a cell depends less on chance
    suites.niah.distractors = 0
    suites.niah.seed = 0
    suites.niah.max_new_tokens = 50

    suites.json_kv = ConfigDict()  # one key of a JSON object of random UUIDs (arXiv 2307.03172)
    suites.json_kv.lengths = ()  # off
    suites.json_kv.n = 100  # as HELMET
    suites.json_kv.seed = 0
    suites.json_kv.max_new_tokens = 100

    suites.rerank = ConfigDict()  # NDCG@10 of the order that the model gives labelled passages
    suites.rerank.file = ""  # off; JSONL of query and passages, each with id, text and relevance
    suites.rerank.n = 100  # queries from the start of the file, as HELMET has
    suites.rerank.length = None  # most tokens, passages at the end of a list left out; None: all passages
    suites.rerank.seed = 0  # of the order in which passages are shown
    suites.rerank.max_new_tokens = 200

    suites.perplexity = ConfigDict()  # loss on plain text by position in the window
    suites.perplexity.file = ""  # off
    suites.perplexity.length = 4096
    suites.perplexity.windows = 32
    suites.perplexity.stride = None  # also overlapping windows, each so many tokens after the one before

    # lm-evaluation-harness (pip install 'retmask_jax[eval]'), in this process.
    suites.lm_eval = ConfigDict()
    suites.lm_eval.tasks = ()  # names of tasks or groups, such as gsm8k, mmlu or the built-in common_knowledge; empty: none
    suites.lm_eval.limit = None  # samples of each task; None: all
    suites.lm_eval.fewshot = None  # examples in the prompt; None: as each task has it
    suites.lm_eval.include_path = ""  # a folder of your own tasks (YAML), besides the harness's
    suites.lm_eval.chat = False  # the harness's default: most published numbers are without the chat template

    # HELMET, in the user's checkout of it, with its data and what its requirements.txt lists.
    suites.helmet = ConfigDict()
    suites.helmet.path = ""  # folder of the checkout; empty: not run
    suites.helmet.lengths = (8192, 16384, 32768, 65536, 131072)  # all it has; none may exceed the model's context
    # Those without a judge; also longqa and summ. The citations of cite need an 11B model (helmet.citations).
    suites.helmet.categories = ("recall", "rag", "cite", "rerank", "icl")
    suites.helmet.limit = None  # samples of each data set; None: HELMET's 100 (icl 500)
    suites.helmet.chat = None  # chat template; None: as in HELMET, where only cite, longqa and summ have one
    suites.helmet.stop_new_line = False  # its configs have this key, but its code never reads it
    suites.helmet.citations = False  # score citations by HELMET's 11B entailment model
    return suites


def task(
    needles,
    haystack="",
    lengths=(),
    depths=(0.1, 0.3, 0.5, 0.7, 0.9),
    per_length=None,
    distractors=0,
    seed=0,
    shuffle=True,
    at_start=False,
    prefix=False,
    max_new_tokens=50,
) -> ConfigDict:
    """A section under `tasks`.

    per_length None: all of lengths x depths x needles. Without lengths the questions are asked without a context.
    prefix: the reply is begun for the model ("The code of the blue door is"), which makes small models answer.
    """
    return ConfigDict(locals())
