# Each target sets itself up in .venv on a fresh machine. TORCH= takes another version, and pip's options with it:
#   make test TORCH="torch==2.11.0 --index-url https://..."
# ARGS= goes to the benchmark: make bench ARGS="moe --json run.json"
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test oldest fuzz lint bench memcheck clean
demo: .venv/ready
	$(BIN)/python examples/demo.py

# Tensors in tests are small: of several threads each would wait for the others, by spinning. And with an empty cache
# Inductor tries the processor's vector instructions anew, for nine seconds in every process, unless told that they work.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=1 $(BIN)/python -m pytest -n 2 --dist worksteal
test: .venv/ready
	$(PYTEST) -m "not gpu and not fuzz"

# The kernels once more, compiled by the oldest Triton there may be, which lies in a folder of its own.
OLDEST := triton==3.6.0
COMPILED := $(addprefix tests/kernels/test_,compile.py few_rows.py many_rows.py mma_rows.py fp8.py stream.py)
oldest: .venv/$(OLDEST)
	PYTHONPATH=$< $(PYTEST) -m "not gpu and not fuzz" $(COMPILED)

fuzz: .venv/ready
	$(PYTEST) -m fuzz

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/python -m fp4pass bench $(ARGS)

# On a GPU, with compute-sanitizer of the CUDA toolkit. Each tensor gets an allocation of its own: inside of torch's pool
# an access beyond a tensor would still be within its block.
memcheck: .venv/ready
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest -m gpu tests/kernels/test_gpu_memory.py

# torch first and by itself: with a CPU build in place nothing later pulls the CUDA packages in.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	touch $@

.venv/$(OLDEST): .venv/ready
	$(BIN)/pip install --quiet --no-deps --target $@ $(OLDEST)
	touch $@

clean:
	rm -rf .venv build *.egg-info
