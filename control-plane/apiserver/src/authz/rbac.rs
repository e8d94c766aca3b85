//! RBAC: roles and bindings as they are stored, taken apart once after each change.

use std::collections::HashMap;
use std::sync::Arc;

use oarlock_kinds::Kind;
use oarlock_store::{Range, Store};
use parking_lot::Mutex;
use serde_json::Value;

use super::{Action, Decision};
use crate::object;
use crate::user::{User, split_service_account};

/// One rule of a role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) verbs: Vec<String>,
    pub(crate) groups: Vec<String>,
    pub(crate) resources: Vec<String>,
    pub(crate) names: Vec<String>,
    pub(crate) paths: Vec<String>,
}

impl Rule {
    pub(crate) fn parse(rule: &Value) -> Rule {
        let list = |field: &str| object::strings(rule.get(field)).map(str::to_owned).collect();
        Rule {
            verbs: list("verbs"),
            groups: list("apiGroups"),
            resources: list("resources"),
            names: list("resourceNames"),
            paths: list("nonResourceURLs"),
        }
    }

    /// What `system:masters` may do with resources.
    pub(crate) fn everything() -> Rule {
        let all = || vec!["*".to_owned()];
        Rule { verbs: all(), groups: all(), resources: all(), ..Rule::default() }
    }

    pub(crate) fn to_value(&self) -> Value {
        let mut out = serde_json::Map::new();
        let fields = [
            ("verbs", &self.verbs),
            ("apiGroups", &self.groups),
            ("resources", &self.resources),
            ("resourceNames", &self.names),
            ("nonResourceURLs", &self.paths),
        ];
        for (name, list) in fields {
            if !list.is_empty() {
                out.insert(name.into(), list.clone().into());
            }
        }
        Value::Object(out)
    }

    /// The rule taken apart: one verb, one resource and at most one name in each part.
    pub(crate) fn singles(&self) -> Vec<Rule> {
        let mut parts = Vec::new();
        for verb in &self.verbs {
            for path in &self.paths {
                parts.push(Rule { verbs: vec![verb.clone()], paths: vec![path.clone()], ..Rule::default() });
            }
            for group in &self.groups {
                for resource in &self.resources {
                    let one = Rule {
                        verbs: vec![verb.clone()],
                        groups: vec![group.clone()],
                        resources: vec![resource.clone()],
                        ..Rule::default()
                    };
                    if self.names.is_empty() {
                        parts.push(one);
                    } else {
                        parts.extend(self.names.iter().map(|name| Rule { names: vec![name.clone()], ..one.clone() }));
                    }
                }
            }
        }
        parts
    }

    /// Whether a single part (see `singles`) is held by one of the rules.
    pub(crate) fn is_covered(&self, held: &[Rule]) -> bool {
        let has = |list: &[String], wanted: &[String]| {
            wanted.iter().all(|one| list.contains(one) || list.iter().any(|own| own == "*"))
        };
        held.iter().any(|own| {
            let resource = |wanted: &String| {
                let subresource = wanted.split_once('/').map(|(_, subresource)| subresource);
                own.resources.iter().any(|pattern| {
                    pattern == "*"
                        || pattern == wanted
                        || pattern.strip_prefix("*/").is_some_and(|pattern| Some(pattern) == subresource)
                })
            };
            let path = |wanted: &String| {
                own.paths.iter().any(|pattern| match pattern.strip_suffix('*') {
                    Some(prefix) => wanted.starts_with(prefix),
                    None => pattern == wanted,
                })
            };
            has(&own.verbs, &self.verbs)
                && has(&own.groups, &self.groups)
                && self.resources.iter().all(resource)
                && self.paths.iter().all(path)
                && (own.names.is_empty()
                    || (!self.names.is_empty() && self.names.iter().all(|name| own.names.contains(name))))
        })
    }

    /// As upstream prints a rule in a refusal.
    pub(crate) fn shown(&self) -> String {
        let parts = [
            ("APIGroups", &self.groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.names),
            ("NonResourceURLs", &self.paths),
            ("Verbs", &self.verbs),
        ];
        let parts: Vec<String> = parts
            .into_iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(name, list)| {
                let quoted: Vec<String> = list.iter().map(|one| format!("{one:?}")).collect();
                format!("{name}:[{}]", quoted.join(" "))
            })
            .collect();
        format!("{{{}}}", parts.join(", "))
    }

    pub(crate) fn allows(&self, action: &Action) -> bool {
        let has = |list: &[String], wanted: &str| list.iter().any(|one| one == "*" || one == wanted);
        if !has(&self.verbs, &action.verb) {
            return false;
        }
        if let Some(path) = &action.path {
            return self.paths.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => pattern == path,
            });
        }
        let resource = |pattern: &String| match pattern.strip_prefix("*/") {
            _ if pattern == "*" => true,
            Some(subresource) => subresource == action.subresource,
            None => *pattern == action.full_resource(),
        };
        has(&self.groups, &action.group)
            && self.resources.iter().any(resource)
            && (self.names.is_empty() || self.names.contains(&action.name))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Subject {
    User(String),
    Group(String),
    ServiceAccount(String, String),
}

impl Subject {
    fn parse(subject: &Value, binding_namespace: &str) -> Option<Subject> {
        let name = subject.get("name")?.as_str()?.to_owned();
        match subject.get("kind")?.as_str()? {
            "User" => Some(Subject::User(name)),
            "Group" => Some(Subject::Group(name)),
            "ServiceAccount" => {
                let namespace = subject.get("namespace").and_then(Value::as_str).unwrap_or(binding_namespace);
                Some(Subject::ServiceAccount(namespace.to_owned(), name))
            }
            _ => None,
        }
    }

    fn is(&self, user: &User) -> bool {
        match self {
            Subject::User(name) => *name == user.name,
            Subject::Group(group) => user.is_in(group),
            Subject::ServiceAccount(namespace, name) => {
                split_service_account(&user.name) == Some((namespace.as_str(), name.as_str()))
            }
        }
    }
}

struct Binding {
    name: String,
    role: String,
    subjects: Vec<Subject>,
    rules: Arc<[Rule]>,
}

/// All bindings with their rules looked up.
#[derive(Default)]
struct Snapshot {
    stamp: [u64; 4],
    cluster: Vec<Binding>,
    by_namespace: HashMap<String, Vec<Binding>>,
}

/// The RBAC authorizer.
pub(crate) struct Rbac {
    kinds: [&'static Kind; 4],
    snapshot: Mutex<Arc<Snapshot>>,
}

const GROUP: &str = "rbac.authorization.k8s.io";

impl Rbac {
    /// None when the table of kinds has no RBAC rows.
    pub(crate) fn new() -> Option<Rbac> {
        let row = |plural| oarlock_kinds::find(GROUP, "v1", plural);
        let kinds = [row("clusterroles")?, row("clusterrolebindings")?, row("roles")?, row("rolebindings")?];
        let snapshot = Snapshot { stamp: [u64::MAX; 4], ..Snapshot::default() };
        Some(Rbac { kinds, snapshot: Mutex::new(Arc::new(snapshot)) })
    }

    pub(crate) fn decide(&self, store: &dyn Store, user: &User, action: &Action) -> Decision {
        let snapshot = self.current(store);
        for binding in &snapshot.cluster {
            if binding.subjects.iter().any(|subject| subject.is(user)) && binding.rules.iter().any(|r| r.allows(action))
            {
                return Decision::Allowed(format!(
                    "RBAC: allowed by ClusterRoleBinding \"{}\" of ClusterRole \"{}\" to {}",
                    binding.name,
                    binding.role,
                    shown_subject(user, &binding.subjects)
                ));
            }
        }
        let local = snapshot.by_namespace.get(&action.namespace).filter(|_| !action.namespace.is_empty());
        for binding in local.into_iter().flatten() {
            if binding.subjects.iter().any(|subject| subject.is(user)) && binding.rules.iter().any(|r| r.allows(action))
            {
                return Decision::Allowed(format!(
                    "RBAC: allowed by RoleBinding \"{}/{}\" of {} to {}",
                    binding.name,
                    action.namespace,
                    binding.role,
                    shown_subject(user, &binding.subjects)
                ));
            }
        }
        Decision::NoOpinion(String::new())
    }

    /// Every rule that applies to a user in a namespace.
    pub(crate) fn rules_for(&self, store: &dyn Store, user: &User, namespace: &str) -> Vec<Rule> {
        let snapshot = self.current(store);
        let local = snapshot.by_namespace.get(namespace).into_iter().flatten();
        let bindings = snapshot.cluster.iter().chain(local);
        let applying = bindings.filter(|binding| binding.subjects.iter().any(|subject| subject.is(user)));
        applying.flat_map(|binding| binding.rules.iter().cloned()).collect()
    }

    /// What a role grants; a cluster role (no namespace) with what it aggregates.
    pub(crate) fn rules_of_role(&self, store: &dyn Store, namespace: &str, name: &str, role: &Value) -> Vec<Rule> {
        let own = || role["rules"].as_array().into_iter().flatten().map(Rule::parse).collect();
        if !namespace.is_empty() || role.get("aggregationRule").is_none() {
            return own();
        }
        let roles = read_all(store, self.kinds[0]);
        let parsed =
            |role: &Value| -> Arc<[Rule]> { role["rules"].as_array().into_iter().flatten().map(Rule::parse).collect() };
        let mut rules = roles.iter().map(|role| (object::name(role), parsed(role))).collect();
        aggregate(&roles, &mut rules);
        rules.get(name).map_or_else(own, |rules| rules.to_vec())
    }

    fn current(&self, store: &dyn Store) -> Arc<Snapshot> {
        let stamp = self.kinds.map(|kind| store.last_change(&object::bucket(kind)));
        let mut snapshot = self.snapshot.lock();
        if snapshot.stamp != stamp {
            *snapshot = Arc::new(self.build(store, stamp));
        }
        snapshot.clone()
    }

    fn build(&self, store: &dyn Store, stamp: [u64; 4]) -> Snapshot {
        let [cluster_roles, cluster_bindings, roles, bindings] = self.kinds.map(|kind| read_all(store, kind));
        let rules_of =
            |role: &Value| -> Arc<[Rule]> { role["rules"].as_array().into_iter().flatten().map(Rule::parse).collect() };
        let mut cluster: HashMap<&str, Arc<[Rule]>> =
            cluster_roles.iter().map(|role| (object::name(role), rules_of(role))).collect();
        aggregate(&cluster_roles, &mut cluster);
        let local: HashMap<(&str, &str), Arc<[Rule]>> = roles
            .iter()
            .map(|role| ((object::text(role, "/metadata/namespace"), object::name(role)), rules_of(role)))
            .collect();
        let none: Arc<[Rule]> = Arc::new([]);
        let bind = |binding: &Value, namespace: &str| {
            let role_kind = object::text(binding, "/roleRef/kind");
            let role = object::text(binding, "/roleRef/name");
            let rules = match role_kind {
                "ClusterRole" => cluster.get(role),
                _ => local.get(&(namespace, role)),
            };
            let subjects = binding["subjects"].as_array().into_iter().flatten();
            Binding {
                name: object::name(binding).to_owned(),
                role: if namespace.is_empty() { role.to_owned() } else { format!("{role_kind} \"{role}\"") },
                subjects: subjects.filter_map(|subject| Subject::parse(subject, namespace)).collect(),
                rules: rules.unwrap_or(&none).clone(),
            }
        };
        let mut by_namespace: HashMap<String, Vec<Binding>> = HashMap::new();
        for binding in &bindings {
            let namespace = object::text(binding, "/metadata/namespace");
            by_namespace.entry(namespace.to_owned()).or_default().push(bind(binding, namespace));
        }
        Snapshot { stamp, cluster: cluster_bindings.iter().map(|binding| bind(binding, "")).collect(), by_namespace }
    }
}

/// Adds to each aggregating role the rules of the roles its selectors match. Roles aggregate roles that aggregate, as
/// `admin` takes in `edit` and that takes in `view`, so this goes as deep as that.
fn aggregate<'r>(roles: &'r [Value], rules: &mut HashMap<&'r str, Arc<[Rule]>>) {
    const DEPTH: usize = 3;
    for _ in 0..DEPTH {
        for role in roles {
            let Some(selectors) = role.pointer("/aggregationRule/clusterRoleSelectors").and_then(Value::as_array)
            else {
                continue;
            };
            let mut union: Vec<Rule> = rules.get(object::name(role)).map(|own| own.to_vec()).unwrap_or_default();
            let others = roles.iter().filter(|other| object::name(other) != object::name(role));
            for other in others.filter(|other| selectors.iter().any(|selector| selects(selector, other))) {
                for rule in rules.get(object::name(other)).into_iter().flat_map(|rules| rules.iter()) {
                    if !union.contains(rule) {
                        union.push(rule.clone());
                    }
                }
            }
            rules.insert(object::name(role), union.into());
        }
    }
}

/// Whether a selector's `matchLabels` all hold of a role. A selector with expressions selects nothing here.
fn selects(selector: &Value, role: &Value) -> bool {
    let Some(wanted) = selector.get("matchLabels").and_then(Value::as_object) else { return false };
    let labels = &role["metadata"]["labels"];
    selector.get("matchExpressions").is_none() && wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn read_all(store: &dyn Store, kind: &Kind) -> Vec<Value> {
    let prefix = object::bucket(kind);
    match store.range(Range { prefix: &prefix, ..Range::default() }) {
        Ok(page) => page.records.iter().map(|record| object::parse(record)).collect(),
        Err(error) => {
            tracing::error!(%error, "roles could not be read; nothing is allowed by them");
            Vec::new()
        }
    }
}

fn shown_subject(user: &User, subjects: &[Subject]) -> String {
    match subjects.iter().find(|subject| subject.is(user)) {
        Some(Subject::User(name)) => format!("User \"{name}\""),
        Some(Subject::Group(name)) => format!("Group \"{name}\""),
        Some(Subject::ServiceAccount(namespace, name)) => format!("ServiceAccount \"{name}/{namespace}\""),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(verb: &str, group: &str, resource: &str, subresource: &str, name: &str) -> Action {
        Action {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            name: name.into(),
            ..Action::default()
        }
    }

    fn rule(verbs: &[&str], groups: &[&str], resources: &[&str], names: &[&str]) -> Rule {
        let own = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect();
        Rule { verbs: own(verbs), groups: own(groups), resources: own(resources), names: own(names), paths: Vec::new() }
    }

    #[test]
    fn a_rule_for_a_resource_does_not_cover_its_subresources() {
        let pods = rule(&["get"], &[""], &["pods"], &[]);
        assert!(pods.allows(&action("get", "", "pods", "", "x")));
        assert!(!pods.allows(&action("get", "", "pods", "log", "x")));
        assert!(!pods.allows(&action("get", "apps", "pods", "", "x")));
        assert!(rule(&["*"], &["*"], &["*"], &[]).allows(&action("get", "", "pods", "log", "x")));
        assert!(rule(&["update"], &["apps"], &["*/scale"], &[]).allows(&action(
            "update",
            "apps",
            "deployments",
            "scale",
            ""
        )));
    }

    #[test]
    fn resource_names_narrow_a_rule() {
        let one = rule(&["get"], &[""], &["secrets"], &["mine"]);
        assert!(one.allows(&action("get", "", "secrets", "", "mine")));
        assert!(!one.allows(&action("get", "", "secrets", "", "yours")));
        assert!(!one.allows(&action("get", "", "secrets", "", "")));
    }

    #[test]
    fn what_is_held_covers_its_parts_and_no_more() {
        let held = [rule(&["get", "list"], &[""], &["pods"], &[]), rule(&["get"], &[""], &["secrets"], &["mine"])];
        let covered = |rule: Rule| rule.singles().iter().all(|single| single.is_covered(&held));
        assert!(covered(rule(&["get"], &[""], &["pods"], &["x"])));
        assert!(covered(rule(&["get"], &[""], &["secrets"], &["mine"])));
        assert!(!covered(rule(&["get"], &[""], &["secrets"], &[])));
        assert!(!covered(rule(&["get", "delete"], &[""], &["pods"], &[])));
        assert!(!covered(rule(&["*"], &["*"], &["*"], &[])));
    }

    #[test]
    fn paths_match_exactly_or_by_prefix() {
        let rule =
            Rule { verbs: vec!["get".into()], paths: vec!["/healthz".into(), "/api/*".into()], ..Rule::default() };
        let path = |path: &str| Action { verb: "get".into(), path: Some(path.into()), ..Action::default() };
        assert!(rule.allows(&path("/healthz")) && rule.allows(&path("/api/v1")));
        assert!(!rule.allows(&path("/healthz/x")) && !rule.allows(&path("/metrics")));
    }
}
