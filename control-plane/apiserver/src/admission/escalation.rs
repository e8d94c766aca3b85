//! Nobody grants by a role or binding what they do not hold, unless allowed to `escalate` or `bind`.

use serde_json::Value;

use crate::authz::rbac::Rule;
use crate::authz::{self, Action, Decision};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::user::MASTERS;

const GROUP: &str = "rbac.authorization.k8s.io";

/// Checks a role or binding that is about to be written.
pub(crate) fn check(ctx: &Context, target: &Target, old: Option<&Value>, new: &Value) -> ApiResult<()> {
    if target.kind.group != GROUP || ctx.user.is_in(MASTERS) {
        return Ok(());
    }
    match target.kind.plural {
        "roles" | "clusterroles" => check_role(ctx, target, old, new),
        _ => check_binding(ctx, target, old, new),
    }
}

fn may(ctx: &Context, verb: &str, resource: &str, namespace: &str, name: &str) -> bool {
    let action = Action {
        verb: verb.into(),
        group: GROUP.into(),
        resource: resource.into(),
        namespace: namespace.into(),
        name: name.into(),
        ..Action::default()
    };
    matches!(authz::decide(&ctx.core, &ctx.user, &action), Decision::Allowed(_))
}

fn rules(role: &Value) -> Vec<Rule> {
    role["rules"].as_array().into_iter().flatten().map(Rule::parse).collect()
}

fn check_role(ctx: &Context, target: &Target, old: Option<&Value>, new: &Value) -> ApiResult<()> {
    let unchanged = old.is_some_and(|old| {
        old.get("rules") == new.get("rules") && old.get("aggregationRule") == new.get("aggregationRule")
    });
    if unchanged || may(ctx, "escalate", target.kind.plural, &target.namespace, object::name(new)) {
        return Ok(());
    }
    if new.get("aggregationRule").is_some_and(|rule| !rule.is_null()) {
        // What it will hold cannot be known, so it takes somebody who holds everything.
        require_held(ctx, target, new, &[Rule::everything()])?;
    }
    require_held(ctx, target, new, &rules(new))
}

fn check_binding(ctx: &Context, target: &Target, old: Option<&Value>, new: &Value) -> ApiResult<()> {
    let unchanged =
        old.is_some_and(|old| old.get("roleRef") == new.get("roleRef") && old.get("subjects") == new.get("subjects"));
    let role_kind = object::text(new, "/roleRef/kind");
    let role = object::text(new, "/roleRef/name");
    let (resource, namespace) = match role_kind {
        "ClusterRole" => ("clusterroles", ""),
        _ => ("roles", &*target.namespace),
    };
    if unchanged || may(ctx, "bind", resource, &target.namespace, role) {
        return Ok(());
    }
    let Some(kind) = oarlock_kinds::find(GROUP, "v1", resource) else { return Ok(()) };
    let record =
        ctx.core.store.get(&object::key(kind, namespace, role)).ok_or_else(|| ApiError::not_found(kind, role))?;
    let granted = ctx.core.rbac.rules_of_role(&*ctx.core.store, namespace, role, &object::parse(&record));
    require_held(ctx, target, new, &granted)
}

fn require_held(ctx: &Context, target: &Target, object: &Value, wanted: &[Rule]) -> ApiResult<()> {
    let held = ctx.core.rbac.rules_for(&*ctx.core.store, &ctx.user, &target.namespace);
    let missing: Vec<String> = wanted
        .iter()
        .flat_map(Rule::singles)
        .filter(|single| !single.is_covered(&held))
        .map(|rule| rule.shown())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let groups: Vec<String> = ctx.user.groups.iter().map(|group| format!("{group:?}")).collect();
    let why = format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        ctx.user.name,
        groups.join(" "),
        missing.join("\n")
    );
    Err(ApiError::forbidden(target.kind, object::name(object), &why))
}
