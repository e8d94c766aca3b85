//! Paths and operations. Clients look for the PATCH operation of a kind and its query parameters.

use super::schemas::Style;
use super::{ServedResource, root};
use crate::Gvk;
use crate::catalogue::catalogue;
use serde_json::{Map, Value, json};

const PATCH_TYPES: &[&str] = &[
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];

pub(super) fn add(paths: &mut Map<String, Value>, served: &ServedResource, style: Style) {
    let root = root(&served.group, &served.version);
    let scope = if served.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("/{root}{scope}/{}", served.plural);
    let item = format!("{collection}/{{name}}");
    let has = |verb: &str| served.verbs.iter().any(|own| own == verb);
    let operation = |verb: &str, action: &str, suffix: &str| {
        Operation { served, gvk: served.gvk(), verb, action, suffix, style }.render()
    };
    let mut on_collection = Map::new();
    for (verb, method, action) in
        [("list", "get", "list"), ("create", "post", "post"), ("deletecollection", "delete", "deletecollection")]
    {
        if has(verb) {
            on_collection.insert(method.to_owned(), operation(verb, action, ""));
        }
    }
    let mut on_item = Map::new();
    for (verb, method) in [("get", "get"), ("update", "put"), ("patch", "patch"), ("delete", "delete")] {
        if has(verb) {
            on_item.insert(method.to_owned(), operation(verb, method, ""));
        }
    }
    insert(paths, collection, on_collection, served.namespaced, false, style);
    if served.namespaced && has("list") {
        let everywhere = Map::from_iter([("get".to_owned(), operation("list", "list", "ForAllNamespaces"))]);
        insert(paths, format!("/{root}/{}", served.plural), everywhere, false, false, style);
    }
    for subresource in &served.subresources {
        let mut methods = Map::new();
        for verb in &subresource.verbs {
            let method = match verb.as_str() {
                "get" => "get",
                "create" => "post",
                "update" => "put",
                "patch" => "patch",
                "delete" => "delete",
                _ => continue,
            };
            let suffix = format!("_{}", subresource.name);
            let operation =
                Operation { served, gvk: subresource.gvk(), verb, action: method, suffix: &suffix, style }.render();
            methods.insert(method.to_owned(), operation);
        }
        insert(paths, format!("{item}/{}", subresource.name), methods, served.namespaced, true, style);
    }
    insert(paths, item, on_item, served.namespaced, true, style);
}

fn insert(
    paths: &mut Map<String, Value>,
    path: String,
    mut methods: Map<String, Value>,
    namespaced: bool,
    named: bool,
    style: Style,
) {
    if methods.is_empty() {
        return;
    }
    let mut parameters = Vec::new();
    if named {
        parameters.push(parameter("name", "path", "string", style));
    }
    if namespaced {
        parameters.push(parameter("namespace", "path", "string", style));
    }
    if !parameters.is_empty() {
        methods.insert("parameters".to_owned(), Value::Array(parameters));
    }
    paths.insert(path, Value::Object(methods));
}

fn parameter(name: &str, place: &str, kind: &str, style: Style) -> Value {
    let mut parameter = match style {
        Style::V2 => json!({"name": name, "in": place, "type": kind, "uniqueItems": true}),
        Style::V3 => json!({"name": name, "in": place, "schema": {"type": kind, "uniqueItems": true}}),
    };
    if place == "path" {
        parameter["required"] = json!(true);
    }
    parameter
}

struct Operation<'a> {
    served: &'a ServedResource,
    gvk: Gvk<'a>,
    verb: &'a str,
    action: &'a str,
    suffix: &'a str,
    style: Style,
}

impl Operation<'_> {
    fn render(&self) -> Value {
        let served = self.served;
        let mut parameters: Vec<Value> =
            self.query().iter().map(|(name, kind)| parameter(name, "query", kind, self.style)).collect();
        let mut rendered = Map::new();
        let tag = match served.group.as_str() {
            "" => format!("core_{}", served.version),
            group => format!("{}_{}", group.split('.').next().unwrap_or(group), served.version),
        };
        rendered.insert("tags".to_owned(), json!([tag]));
        let id = format!("{}{}{}{}{}", self.action, camel(&tag), scope(served), served.kind, camel(self.suffix));
        rendered.insert("operationId".to_owned(), json!(id));
        let body = match self.verb {
            "create" | "update" => catalogue().by_gvk(self.gvk).map(|id| catalogue().full_name(id)),
            "patch" => Some("io.k8s.apimachinery.pkg.apis.meta.v1.Patch".to_owned()),
            "delete" | "deletecollection" => Some("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions".to_owned()),
            _ => None,
        };
        let kind = match self.verb {
            "list" => format!("{}List", served.kind),
            "deletecollection" => "Status".to_owned(),
            _ => self.gvk.kind.to_owned(),
        };
        let answer = catalogue().by_gvk(Gvk { kind: &kind, ..self.gvk }).map(|id| catalogue().full_name(id));
        match self.style {
            Style::V2 => self.v2(&mut rendered, &mut parameters, body, answer),
            Style::V3 => self.v3(&mut rendered, body, answer),
        }
        rendered.insert("parameters".to_owned(), Value::Array(parameters));
        let action = if self.verb == "update" { "put" } else { self.action };
        rendered.insert("x-kubernetes-action".to_owned(), json!(action));
        rendered.insert(
            "x-kubernetes-group-version-kind".to_owned(),
            json!({"group": self.gvk.group, "version": self.gvk.version, "kind": self.gvk.kind}),
        );
        Value::Object(rendered)
    }

    fn consumes(&self) -> &'static [&'static str] {
        if self.verb == "patch" { PATCH_TYPES } else { &["application/json", "application/yaml"] }
    }

    fn v2(
        &self,
        rendered: &mut Map<String, Value>,
        parameters: &mut Vec<Value>,
        body: Option<String>,
        answer: Option<String>,
    ) {
        rendered.insert("consumes".to_owned(), json!(self.consumes()));
        rendered.insert("produces".to_owned(), json!(["application/json", "application/yaml"]));
        if let Some(body) = body {
            let required = !self.verb.starts_with("delete");
            let schema = json!({"$ref": self.style.reference(&body)});
            let mut parameter = json!({"name": "body", "in": "body", "schema": schema});
            if required {
                parameter["required"] = json!(true);
            }
            parameters.insert(0, parameter);
        }
        let mut response = json!({"description": "OK"});
        if let Some(answer) = answer {
            response["schema"] = json!({"$ref": self.style.reference(&answer)});
        }
        rendered.insert("responses".to_owned(), json!({"200": response}));
    }

    fn v3(&self, rendered: &mut Map<String, Value>, body: Option<String>, answer: Option<String>) {
        let content = |name: &str, types: &[&str]| {
            let schema = json!({"schema": {"$ref": self.style.reference(name)}});
            types.iter().map(|media| ((*media).to_owned(), schema.clone())).collect::<Map<String, Value>>()
        };
        if let Some(body) = body {
            let types = if self.verb == "patch" { PATCH_TYPES } else { &["*/*"][..] };
            let required = !self.verb.starts_with("delete");
            rendered.insert("requestBody".to_owned(), json!({"content": content(&body, types), "required": required}));
        }
        let mut response = json!({"description": "OK"});
        if let Some(answer) = answer {
            response["content"] = Value::Object(content(&answer, &["application/json"]));
        }
        rendered.insert("responses".to_owned(), json!({"200": response}));
    }

    fn query(&self) -> &'static [(&'static str, &'static str)] {
        match self.verb {
            "create" | "update" => {
                &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string"), ("pretty", "string")]
            }
            "patch" => &[
                ("dryRun", "string"),
                ("fieldManager", "string"),
                ("fieldValidation", "string"),
                ("force", "boolean"),
                ("pretty", "string"),
            ],
            "delete" => &[
                ("dryRun", "string"),
                ("gracePeriodSeconds", "integer"),
                ("orphanDependents", "boolean"),
                ("propagationPolicy", "string"),
                ("pretty", "string"),
            ],
            "list" | "deletecollection" => &[
                ("allowWatchBookmarks", "boolean"),
                ("continue", "string"),
                ("fieldSelector", "string"),
                ("labelSelector", "string"),
                ("limit", "integer"),
                ("resourceVersion", "string"),
                ("resourceVersionMatch", "string"),
                ("sendInitialEvents", "boolean"),
                ("timeoutSeconds", "integer"),
                ("watch", "boolean"),
                ("pretty", "string"),
            ],
            _ => &[("pretty", "string")],
        }
    }
}

fn scope(served: &ServedResource) -> &'static str {
    if served.namespaced { "Namespaced" } else { "" }
}

/// `core_v1` to `CoreV1`.
fn camel(text: &str) -> String {
    text.split(['_', '-', '.'])
        .map(|word| {
            let mut letters = word.chars();
            letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
        })
        .collect()
}
