//! Nothing is created in a namespace that is missing or on its way out.

use std::time::Duration;

use serde_json::json;

use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;

/// A namespace that was created a moment ago through another server may not have arrived here yet.
const ARRIVAL: Duration = Duration::from_millis(50);

pub(crate) async fn accepts_new_objects(ctx: &Context, target: &Target) -> ApiResult<()> {
    if !target.kind.namespaced {
        return Ok(());
    }
    let Some(namespaces) = oarlock_kinds::find("", "v1", "namespaces") else { return Ok(()) };
    let key = object::key(namespaces, "", &target.namespace);
    let mut record = ctx.core.store.get(&key);
    if record.is_none() {
        if let Ok(mut changes) = ctx.core.store.watch(&key, ctx.core.store.current_revision()) {
            let _ = tokio::time::timeout(ARRIVAL, changes.next(1)).await;
        }
        record = ctx.core.store.get(&key);
    }
    let Some(record) = record else { return Err(ApiError::not_found(namespaces, &target.namespace)) };
    let namespace = object::parse(&record);
    if !object::is_deleting(&namespace) {
        return Ok(());
    }
    let why = format!("unable to create new content in namespace {} because it is being terminated", target.namespace);
    let mut error = ApiError::forbidden(target.kind, "", &why);
    let mut details = error.details.take().map_or_else(|| json!({}), |details| *details);
    details["causes"] = json!([{
        "reason": "NamespaceTerminating",
        "message": format!("namespace {} is being terminated", target.namespace),
        "field": "metadata.namespace",
    }]);
    Err(error.with_details(details))
}
