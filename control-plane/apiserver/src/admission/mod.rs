//! Admission: what the server adds to objects and refuses beyond what their own validation says.

mod escalation;
mod namespaces;
mod nodes;
mod pods;

use serde_json::Value;

use crate::core::{Context, Target};
use crate::error::ApiResult;
use crate::registry::Change;

/// Runs before a new object is validated.
pub(crate) async fn on_create(ctx: &Context, target: &Target, object: &mut Value) -> ApiResult<()> {
    namespaces::accepts_new_objects(ctx, target).await?;
    nodes::on_create(ctx, target, object)?;
    escalation::check(ctx, target, None, object)?;
    if target.kind.storage == "pods" {
        pods::on_create(ctx, target, object).await?;
    }
    Ok(())
}

/// Runs before a changed object is validated.
pub(crate) fn on_update(
    ctx: &Context,
    target: &Target,
    change: &Change<'_>,
    old: &Value,
    new: &mut Value,
) -> ApiResult<()> {
    nodes::on_update(ctx, target, change, old, new)?;
    escalation::check(ctx, target, Some(old), new)
}

/// Whether the user may delete the object.
pub(crate) fn on_delete(ctx: &Context, target: &Target) -> ApiResult<()> {
    nodes::on_delete(ctx, target)
}
