//! The catalogue of published types: an index over the embedded table `data/types.tsv`.
//!
//! The table is text that stays in the binary; the index is built once, on first use, and only points into it. Lines
//! start with `!` (a namespace: short prefix, full OpenAPI prefix), `=` (a type) or a property name (a property of the
//! type above; `-` is a protobuf message whose properties are written inline). docs/design says where its facts come from.

use std::collections::HashMap;
use std::sync::OnceLock;

const TABLE: &str = include_str!("../data/types.tsv");

/// Index of a type in the catalogue.
pub(crate) type TypeId = u16;

/// What a JSON value is, below any list or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaf {
    String,
    Bool,
    Int32,
    Int64,
    Double,
    /// Base64 in JSON.
    Bytes,
    Quantity,
    IntOrString,
    Time,
    MicroTime,
    Duration,
    /// Any JSON object (RawExtension) or value (apiextensions JSON).
    Raw,
    /// A FieldsV1 set, as an object.
    Fields,
    /// A list of strings that protobuf wraps in a message of its own.
    WrappedStrings,
    SchemaOrArray,
    SchemaOrBool,
    SchemaOrStrings,
    Object(TypeId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    One(Leaf),
    List(Leaf),
    /// String keys.
    Map(Leaf),
}

impl Shape {
    pub(crate) fn leaf(self) -> Leaf {
        match self {
            Self::One(leaf) | Self::List(leaf) | Self::Map(leaf) => leaf,
        }
    }
}

/// How several appliers share a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListType {
    /// Also what a list without a declaration is.
    Atomic,
    Set,
    /// Keys separated by commas.
    Map(&'static str),
}

#[derive(Debug)]
pub(crate) struct Property {
    /// `-` marks an inline message, which has no JSON name of its own.
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    /// 0 for properties that an inline message carries.
    pub(crate) tag: u32,
    /// A Go pointer: zero values are kept.
    pub(crate) pointer: bool,
    pub(crate) required: bool,
    /// Written even when empty.
    pub(crate) keep: bool,
    /// Of an inline message.
    pub(crate) inlined: bool,
    pub(crate) list_type: ListType,
    pub(crate) atomic_map: bool,
    pub(crate) patch_merge: bool,
    pub(crate) patch_replace: bool,
    pub(crate) patch_retain_keys: bool,
    pub(crate) merge_key: Option<&'static str>,
    /// JSON text.
    pub(crate) default: Option<&'static str>,
    /// Name of the Go type in decoding errors, where the JSON type does not give it.
    pub(crate) go_type: Option<&'static str>,
}

impl Property {
    pub(crate) fn is_inline_message(&self) -> bool {
        self.name == "-"
    }

    pub(crate) fn list_keys(&self) -> impl Iterator<Item = &'static str> {
        let keys = if let ListType::Map(keys) = self.list_type { keys } else { "" };
        keys.split(',').filter(|key| !key.is_empty())
    }
}

#[derive(Debug)]
pub(crate) struct TypeInfo {
    /// Short: `core.v1.Pod`.
    pub(crate) name: &'static str,
    /// `/v1/Pod` or `apps/v1/Deployment`, where the type is a kind.
    pub(crate) gvk: Option<&'static str>,
    pub(crate) atomic: bool,
    properties: std::ops::Range<usize>,
}

pub(crate) struct Catalogue {
    types: Vec<TypeInfo>,
    properties: Vec<Property>,
    by_name: HashMap<&'static str, TypeId>,
    by_gvk: HashMap<&'static str, TypeId>,
    namespaces: Vec<(&'static str, &'static str)>,
}

/// The catalogue, built on first use.
pub(crate) fn catalogue() -> &'static Catalogue {
    static CATALOGUE: OnceLock<Catalogue> = OnceLock::new();
    CATALOGUE.get_or_init(Catalogue::parse)
}

impl Catalogue {
    fn parse() -> Self {
        let names = TABLE.lines().filter_map(|line| line.strip_prefix('=')).map(first_cell);
        let by_name: HashMap<&'static str, TypeId> = names.zip(0..).collect();
        let mut catalogue = Self {
            types: Vec::with_capacity(by_name.len()),
            properties: Vec::new(),
            by_gvk: HashMap::new(),
            by_name,
            namespaces: Vec::new(),
        };
        for line in TABLE.lines() {
            if let Some(rest) = line.strip_prefix('!') {
                catalogue.namespaces.extend(rest.split_once('\t'));
            } else if let Some(rest) = line.strip_prefix('=') {
                catalogue.push_type(rest);
            } else {
                catalogue.push_property(line);
            }
        }
        catalogue.properties.shrink_to_fit();
        catalogue
    }

    fn push_type(&mut self, line: &'static str) {
        let mut cells = line.split('\t');
        let name = cells.next().unwrap_or_default();
        let mut info =
            TypeInfo { name, gvk: None, atomic: false, properties: self.properties.len()..self.properties.len() };
        for cell in cells {
            if let Some(gvk) = cell.strip_prefix("gvk=") {
                info.gvk = Some(gvk);
                let id = self.by_name[name];
                self.by_gvk.insert(gvk, id);
            } else if cell == "atomic" {
                info.atomic = true;
            }
        }
        self.types.push(info);
    }

    fn push_property(&mut self, line: &'static str) {
        let mut cells = line.split('\t');
        let name = cells.next().unwrap_or_default();
        let shape = self.shape(cells.next().unwrap_or_default());
        let mut property = Property {
            name,
            shape,
            tag: 0,
            pointer: false,
            required: false,
            keep: false,
            inlined: false,
            list_type: ListType::Atomic,
            atomic_map: false,
            patch_merge: false,
            patch_replace: false,
            patch_retain_keys: false,
            merge_key: None,
            default: None,
            go_type: None,
        };
        for cell in cells {
            read_flag(&mut property, cell);
        }
        self.properties.push(property);
        if let Some(last) = self.types.last_mut() {
            last.properties.end = self.properties.len();
        }
    }

    fn shape(&self, cell: &'static str) -> Shape {
        if let Some(inner) = cell.strip_prefix('[') {
            Shape::List(self.leaf(inner))
        } else if let Some(inner) = cell.strip_prefix('{') {
            Shape::Map(self.leaf(inner))
        } else {
            Shape::One(self.leaf(cell))
        }
    }

    fn leaf(&self, cell: &'static str) -> Leaf {
        match cell {
            "string" => Leaf::String,
            "bool" => Leaf::Bool,
            "int32" => Leaf::Int32,
            "int64" => Leaf::Int64,
            "double" => Leaf::Double,
            "bytes" => Leaf::Bytes,
            "quantity" => Leaf::Quantity,
            "intorstring" => Leaf::IntOrString,
            "time" => Leaf::Time,
            "microtime" => Leaf::MicroTime,
            "duration" => Leaf::Duration,
            "fields" => Leaf::Fields,
            "wrapped" => Leaf::WrappedStrings,
            "schema_or_array" => Leaf::SchemaOrArray,
            "schema_or_bool" => Leaf::SchemaOrBool,
            "schema_or_strings" => Leaf::SchemaOrStrings,
            _ => match cell.strip_prefix('@').and_then(|name| self.by_name.get(name)) {
                Some(id) => Leaf::Object(*id),
                None => Leaf::Raw,
            },
        }
    }

    pub(crate) fn info(&self, id: TypeId) -> &TypeInfo {
        &self.types[usize::from(id)]
    }

    /// All properties, inline messages included.
    pub(crate) fn properties(&self, id: TypeId) -> &[Property] {
        &self.properties[self.info(id).properties.clone()]
    }

    /// The property of a JSON name.
    pub(crate) fn property(&self, id: TypeId, name: &str) -> Option<&Property> {
        if name == "-" {
            return None;
        }
        self.properties(id).iter().find(|property| property.name == name)
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<TypeId> {
        self.by_name.get(name).copied()
    }

    /// The type of a kind. Options and Status kinds of `meta.k8s.io` are part of every group.
    pub(crate) fn by_gvk(&self, gvk: crate::Gvk<'_>) -> Option<TypeId> {
        let key = format!("{}/{}/{}", gvk.group, gvk.version, gvk.kind);
        if let Some(id) = self.by_gvk.get(key.as_str()) {
            return Some(*id);
        }
        match gvk.kind {
            "DeleteOptions" => self.by_name("meta.v1.DeleteOptions"),
            "Status" => self.by_name("meta.v1.Status"),
            _ => None,
        }
    }

    /// `io.k8s.api.core.v1.Pod` of `core.v1.Pod`.
    pub(crate) fn full_name(&self, id: TypeId) -> String {
        let name = self.info(id).name;
        let (short, kind) = name.rsplit_once('.').unwrap_or(("", name));
        let full = self.namespaces.iter().find(|(prefix, _)| *prefix == short).map_or(short, |(_, full)| full);
        format!("{full}.{kind}")
    }
}

fn first_cell(line: &'static str) -> &'static str {
    line.split('\t').next().unwrap_or_default()
}

fn read_flag(property: &mut Property, cell: &'static str) {
    match cell {
        "ptr" => property.pointer = true,
        "req" => property.required = true,
        "keep" => property.keep = true,
        "via" => property.inlined = true,
        "set" => property.list_type = ListType::Set,
        "atomic" => property.atomic_map = matches!(property.shape, Shape::Map(_) | Shape::One(_)),
        _ => {
            if let Some(tag) = cell.strip_prefix('#') {
                property.tag = tag.parse().unwrap_or(0);
            } else if let Some((name, value)) = cell.split_once('=') {
                match name {
                    "keys" => property.list_type = ListType::Map(value),
                    "patch" => {
                        property.patch_merge = value.split(',').any(|item| item == "merge");
                        property.patch_replace = value.split(',').any(|item| item == "replace");
                        property.patch_retain_keys = value.split(',').any(|item| item == "retainKeys");
                    }
                    "mergekey" => property.merge_key = Some(value),
                    "default" => property.default = Some(value),
                    "go" => property.go_type = Some(value),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gvk;

    #[test]
    fn a_pod_is_found_with_its_lists_and_merge_keys() {
        let all = catalogue();
        let pod = all.by_gvk(Gvk::new("", "v1", "Pod")).expect("Pod");
        assert_eq!(all.full_name(pod), "io.k8s.api.core.v1.Pod");
        let Shape::One(Leaf::Object(spec)) = all.property(pod, "spec").expect("spec").shape else { panic!("spec") };
        let containers = all.property(spec, "containers").expect("containers");
        assert_eq!(containers.merge_key, Some("name"));
        assert_eq!(containers.list_keys().collect::<Vec<_>>(), ["name"]);
        assert!(containers.required);
    }

    #[test]
    fn every_reference_of_the_table_resolves() {
        let all = catalogue();
        for line in TABLE.lines().filter(|line| !line.starts_with(['!', '='])) {
            let cell = line.split('\t').nth(1).expect("a type cell");
            if let Some(name) = cell.trim_start_matches(['[', '{']).strip_prefix('@') {
                assert!(all.by_name(name).is_some(), "{name}");
            }
        }
        assert!(all.types.len() > 500);
    }

    #[test]
    fn the_index_stays_small() {
        let all = catalogue();
        let bytes = all.properties.capacity() * size_of::<Property>()
            + all.types.capacity() * size_of::<TypeInfo>()
            + (all.by_name.capacity() + all.by_gvk.capacity()) * (size_of::<(&str, TypeId)>() + 1);
        assert!(bytes < 1024 * 1024, "{bytes} bytes");
        assert!(TABLE.len() < 128 * 1024, "{} bytes", TABLE.len());
    }

    #[test]
    fn delete_options_belong_to_every_group() {
        assert!(catalogue().by_gvk(Gvk::new("apps", "v1", "DeleteOptions")).is_some());
        assert!(catalogue().by_gvk(Gvk::new("policy", "v1", "Eviction")).is_some());
        assert!(catalogue().by_gvk(Gvk::new("example.com", "v1", "Thing")).is_none());
    }
}
