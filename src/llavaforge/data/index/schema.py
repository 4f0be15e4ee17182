"""The columns of a prepared data set, a row for each sample."""

import pyarrow as pa

_IMAGE = pa.struct(  # an `ImageRef`
    {"name": pa.string(), "container": pa.int32(), "offset": pa.int64(), "size": pa.int64(), "crc": pa.int64()}
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("images", pa.list_(_IMAGE)),
        ("ids", pa.list_(pa.int32())),
        ("supervised_spans", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("num_supervised", pa.int32()),
        ("num_turns_dropped", pa.int32()),
        ("num_tokens_cut", pa.int32()),
        ("num_literals", pa.int32()),
        ("num_special_tokens", pa.int32()),
        ("has_boxes", pa.bool_()),
        ("digest", pa.uint64()),
    ]
)
