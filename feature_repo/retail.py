"""What is a retail customer's behaviour? Feast definitions; paths are below the store's folder."""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, String

from perennial.data import churn

customer = Entity(
    name="customer",
    join_keys=["customer_id"],
    value_type=ValueType.INT64,
    description="A customer of the shop, as CustomerID names them.",
)

purchases = FileSource(
    name="customer_purchases",
    path="rows.parquet",
    timestamp_field="event_time",
    description="One row for each weekly cut-off and customer, made by the features step.",
)

customer_purchases = FeatureView(
    name="customer_purchases",
    entities=[customer],
    # Weekly rows: older ones say nothing about a customer any more.
    ttl=timedelta(days=14),
    schema=[
        Field(name=name, dtype=String if name == "country" else Float64) for name in churn.FEATURES
    ],
    source=purchases,
    online=True,
    description="Purchases of a customer in the 90 days before a cut-off.",
)
