"""Why a quantized product was left as it was, or why experts' products became no whole block, with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class _Said(Enum):
    """The value is (sentence, remedy)."""

    @property
    def sentence(self) -> str:
        """What was found."""
        return self.value[0]

    @property
    def remedy(self) -> str:
        """What to do."""
        return self.value[1]


class Reason(_Said):
    """A refusal's kind."""

    ACTIVATION = (
        "an activation takes part in computing the weight",
        "apply it to the product's input or output instead",
    )
    BATCHED = (
        "every expert gets its own batch of rows, a form that has no kernel",
        "use the grouped_mm or batched_mm experts of transformers",
    )
    EIGHT_BIT = (
        "the weight has one byte an element, not two codes a byte, and is not E4M3 with one scale",
        "8-bit weights are rewritten as E4M3 bytes times one float; others run as they are",
    )
    GROUPS = (
        "the block scales are not constant over 16 neighbouring elements of a row",
        "check the group size and where its first block begins",
    )
    IDS = (
        "codes, scales and global scales are gathered by different expert ids",
        "index all three with the same tensor",
    )
    BACKWARD = (
        "the product belongs to the backward of an expert, which has no kernel",
        "run the experts under torch.no_grad() or torch.inference_mode()",
    )
    DENSE = (
        "the weight is dense and only rounded to FP4 at every call",
        "pack it with modelopt.torch.quantization.compress, or export the model and load the checkpoint",
    )
    DISABLED = (
        "the pass that would rewrite it is switched off",
        "leave it out of the option `disable`",
    )
    DTYPE = (
        "the product's operands have a dtype that has no kernel",
        "use bfloat16, float16 or float32 activations, and cast the decoded weight to the same",
    )
    FP4_ACTIVATION = (
        "the activation arrives in FP4 and cannot be traced to the values that were quantized",
        "quantize it in the same graph, by an operation that the un-fusing knows, or keep it in bfloat16",
    )
    FP4_CONSUMER = (
        "an operation that is not known takes the FP4 activation",
        "keep the activation of that operation in bfloat16",
    )
    FP8_ACTIVATION = (
        "the activation arrives in FP8 and no static scale that would undo it is in the graph",
        "quantize it with a static scale in the same graph, or keep it in bfloat16",
    )
    FAILED = (
        "the rewrite itself failed",
        "please report this with the log of TORCH_LOGS=+fp4pass",
    )
    MIXED_ROWS = (
        "rows are looked up in a table that is stored in an order that mixes them",
        "keep tables of embeddings in the checkpoint's order",
    )
    NATIVE_FP4 = (
        "this GPU multiplies FP4 natively (SM100 and up)",
        "use a backend that does; fp4pass serves GPUs below SM100",
    )
    NO_PRODUCT = (
        "the weight meets an activation in an operation that is no matrix product to fp4pass",
        "multiply by a linear layer, torch.mm, torch.bmm or a grouped product",
    )
    NO_SCALES = (
        "no block scales were found beside the codes",
        "NVFP4 needs an E4M3 scale for every 16 elements",
    )
    NO_TWIN = (
        "the operation has no plain form",
        "build the model without this operation, so that it gives or takes bfloat16",
    )
    NOT_E2M1 = (
        "the codes do not decode to E2M1 values",
        "NVFP4 codes stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives",
    )
    NOT_UNIFORM = (
        "some rows or experts are decoded differently from the others",
        "decode every row and every expert alike",
    )
    ROWS_PICKED = (
        "an index picks or reorders rows of the weight",
        "multiply by the whole weight and pick from the product",
    )
    SCALES_MISPLACED = (
        "the block scales are read in an order that is neither linear nor the 128x4 tiles",
        "store scales row by row: one for every 16 elements of a row",
    )
    STRIDED = (
        "codes or block scales do not lie contiguously in memory",
        "call .contiguous() on them once, when loading",
    )
    TABLE_CHANGES = (
        "the decode table is an argument of the call, so its values may change under the compiled graph",
        "make the table a buffer of the module or a constant",
    )
    TABLE_UNKNOWN = (
        "the values of the decode table cannot be read while compiling",
        "give the table real values (not meta or fake ones)",
    )
    TOO_LARGE = (
        "the decode slices or indexes rows or experts by constants, and the weight is too large, or of too many sizes, "
        "to run in full",
        "decode all rows and experts by the same operations",
    )
    TOO_OLD = (
        "this GPU is below SM80",
        "fp4pass needs an Ampere, Ada or Hopper GPU",
    )
    UNKNOWN_FP4 = (
        "an operation has FP4 in its name and is not known",
        "if it needs SM100, build the model without it, so that its layer stays in bfloat16",
    )
    UNKNOWN_OP = (
        "the weight is computed by an operation that cannot be run for the proof",
        "decode with plain PyTorch operations",
    )
    VARIANT = (
        "this variant of the operation is not NVFP4 as fp4pass knows it",
        "quantize in blocks of 16 with E4M3 block scales, linear or in 128x4 tiles",
    )
    WRONG_AXIS = (
        "the codes are not packed along the axis that the product sums over",
        "pack codes along K, the input features",
    )
    WRONG_VALUES = (
        "the decoded weight is not code x block scale x global scale",
        "look for a clamp, an extra factor or an offset in the decode",
    )


class Apart(_Said):
    """Why experts' products are rewritten one by one, not as a whole block."""

    DTYPE = (
        "tokens and result of the block have different dtypes, or the two weights lie in different orders",
        "give both the same",
    )
    GATED = (
        "the experts have a gate, and whole blocks are for experts without one",
        "nothing: each of its products is rewritten",
    )
    INPUTS = (
        "something beside tokens, expert ids and routing weights takes part between the first product and the sum",
        "apply it to the tokens before or to the sum after",
    )
    NO_SUM = (
        "no sum over the experts of each token follows the second product",
        "weight the results and sum them with torch.sum, as transformers' grouped_mm and batched_mm experts do",
    )
    ONE = (
        "each token has one expert, and whole blocks are for several",
        "nothing: each of its products is rewritten",
    )
    OTHER = (
        "tried with numbers, the block is not the sum of routing weight x down(activation(up(token)))",
        "use relu2 or silu as the activation, and weight what the second product gives",
    )
    PLACES = (
        "rows are told apart by their place, and their number varies",
        "let expert ids alone say what becomes of a row",
    )
    READ = (
        "a result inside of the block is used outside of it, too",
        "compute what is needed there apart from the block",
    )


@dataclass(frozen=True)
class Refusal:
    """A reason with what was seen in this case."""

    reason: Reason | Apart
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.sentence} ({self.detail})" if self.detail else self.reason.sentence
