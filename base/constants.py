"""Names that several places must agree on: keys of a batch, kinds of values, what is done to them, splits."""

# The keys of a batch: B sentences of S cells, K perturbations applied together.
CONTROL_CELLS = "control_cells"
PERTURBATION_IDS = "perturbation_ids"
PERTURBATION_DOSES = "perturbation_doses"
PERTURBATION_FEATURES = "perturbation_features"
CONTEXT_IDS = "context_ids"
BATCH_IDS = "batch_ids"
CELL_MASK = "cell_mask"
CELL_PLACES = "cell_places"
CONTROL_EXPRESSION = "control_expression"
CONTROL_COUNTS = "control_counts"
LABELS = "labels"
GENE_LABELS = "gene_labels"


# What the models do: the task of their pipeline, and of their cards.
TASK = "perturbation-prediction"


class Values:
    """Kinds of values of a cell. A model reads the first three."""

    COUNTS = "counts"
    LOG1P = "log1p"
    EMBEDDING = "embedding"
    # Counts that are not whole: corrected for ambient RNA, imputed, or shared between genes.
    FRACTIONAL = "fractional counts"
    # Both are counted in units of molecules, and can be scaled to a number of counts per cell.
    RAW = (COUNTS, FRACTIONAL)
    # Fractional values larger than any log1p value: normalised, not yet log1p.
    LINEAR = "linear"
    # Nothing but zeros, which may be counts or log1p.
    ZEROS = "zeros"


class Normalize:
    """What is done to the values that are read: the option `normalize`."""

    # Find out from the values; a run's option, never a processor's.
    AUTO = "auto"
    COUNTS_TO_LOG1P = "counts_to_log1p"
    NONE = "none"

    OPTIONS = (AUTO, COUNTS_TO_LOG1P, NONE)


class Split:
    """Splits of the cells. Control cells are in none of the first three: every split draws from them."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"
    CONTROL = "control"
    UNUSED = "unused"
