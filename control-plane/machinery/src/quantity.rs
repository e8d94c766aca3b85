//! The API's quantities as integers. Owns only the convention that an unreadable one counts as zero.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Whole units, rounded up (bytes of memory, pods, devices). An unreadable quantity counts as zero.
pub fn value(quantity: &Quantity) -> i64 {
    oarlock_quantity::units(&quantity.0).unwrap_or(0)
}

/// Thousandths, rounded up (CPU). An unreadable quantity counts as zero.
pub fn milli(quantity: &Quantity) -> i64 {
    oarlock_quantity::milli(&quantity.0).unwrap_or(0)
}
