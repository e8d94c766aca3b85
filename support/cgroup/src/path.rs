//! Names of groups: plain relative paths, and their translation from the systemd form. Pure.

use crate::CgroupError;

const SLICE: &str = ".slice";
const SCOPE: &str = ".scope";

/// Brings a path as specifications write it to the form used here.
///
/// `slice:prefix:name` (the systemd form) becomes the path of that scope: `a-b.slice:cri:id` is
/// `a.slice/a-b.slice/cri-id.scope`. Anything else is taken as a path; leading and doubled slashes go.
pub fn translate(path: &str) -> Result<String, CgroupError> {
    let bad = || CgroupError::BadPath { path: path.to_owned() };
    if let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..] {
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let parents = expand_slice(slice).ok_or_else(bad)?;
        let unit = match (prefix, name) {
            (_, "") => return Err(bad()),
            ("", name) => name.to_owned(),
            (prefix, name) => format!("{prefix}-{name}"),
        };
        let unit = if unit.ends_with(SLICE) { unit } else { format!("{unit}{SCOPE}") };
        return clean(&format!("{parents}/{unit}")).ok_or_else(bad);
    }
    clean(path).ok_or_else(bad)
}

/// A systemd unit that has a group: a scope, or a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    pub name: String,
    /// The slice that it lies in.
    pub slice: String,
}

impl Unit {
    /// The unit whose group lies at a path in the form used here; None where that is a plain group.
    pub fn at(path: &str) -> Option<Unit> {
        let mut parts = path.trim_matches('/').rsplit('/');
        let name = parts.next().filter(|name| name.ends_with(SCOPE) || name.ends_with(SLICE))?;
        Some(Unit { name: name.to_owned(), slice: parts.next().unwrap_or("-.slice").to_owned() })
    }

    pub fn is_slice(&self) -> bool {
        self.name.ends_with(SLICE)
    }

    /// The form in which specifications name a scope: `slice:prefix:name`. None for a slice.
    pub fn specified(&self) -> Option<String> {
        let stem = self.name.strip_suffix(SCOPE)?;
        let (prefix, name) = stem.rsplit_once('-').unwrap_or(("", stem));
        Some(format!("{}:{prefix}:{name}", self.slice))
    }
}

/// The slice of these names one below the other; a dash within a name, which would stand for a level, is an underscore.
pub fn slice_name(parts: &[&str]) -> String {
    let parts: Vec<String> = parts.iter().map(|part| part.replace('-', "_")).collect();
    format!("{}{SLICE}", parts.join("-"))
}

/// Where the group of a slice lies: `a-b-c.slice` is in `a-b.slice`, which is in `a.slice`. None for what is not a slice.
pub fn expand_slice(slice: &str) -> Option<String> {
    let stem = slice.strip_suffix(SLICE)?;
    if stem == "-" {
        return Some(String::new());
    }
    let mut path = String::new();
    let mut prefix = String::new();
    for part in stem.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        prefix.push_str(part);
        path.push_str(&format!("{prefix}.slice/"));
        prefix.push('-');
    }
    path.pop();
    Some(path)
}

/// Removes empty parts; refuses parts that would climb, and control characters.
pub(crate) fn clean(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let harmless = |part: &&str| *part != ".." && !part.contains(|c: char| c.is_control());
    (!parts.is_empty() && parts.iter().all(harmless)).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_names_become_paths() {
        assert_eq!(translate("a-b.slice:cri:id").unwrap(), "a.slice/a-b.slice/cri-id.scope");
        assert_eq!(translate(":cri:id").unwrap(), "system.slice/cri-id.scope");
        assert_eq!(translate("-.slice::x").unwrap(), "x.scope");
    }

    #[test]
    fn a_unit_is_known_by_its_path_and_named_as_specifications_do() {
        let scope = Unit::at("a.slice/a-b.slice/cri-oarlock-0f.scope").unwrap();
        assert_eq!((scope.name.as_str(), scope.slice.as_str()), ("cri-oarlock-0f.scope", "a-b.slice"));
        let specified = scope.specified().unwrap();
        assert_eq!(specified, "a-b.slice:cri-oarlock:0f");
        assert_eq!(translate(&specified).unwrap(), "a.slice/a-b.slice/cri-oarlock-0f.scope");
        let slice = Unit::at("/a.slice").unwrap();
        assert!(slice.is_slice() && slice.slice == "-.slice" && slice.specified().is_none());
        assert_eq!(Unit::at("kubepods/pod1/c"), None);
        assert_eq!(Unit::at("a.slice/plain"), None);
    }

    #[test]
    fn slices_lie_in_those_that_their_names_begin_with() {
        let name = slice_name(&["kubepods", "burstable", "pod1-2-3"]);
        assert_eq!(name, "kubepods-burstable-pod1_2_3.slice");
        let path = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2_3.slice";
        assert_eq!(expand_slice(&name).as_deref(), Some(path));
        assert_eq!(expand_slice("-.slice").as_deref(), Some(""));
        for wrong in ["a", ".slice", "a--b.slice", "-a.slice", "a-.slice", "a/b.slice", ""] {
            assert_eq!(expand_slice(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn plain_paths_lose_only_superfluous_slashes() {
        assert_eq!(translate("/kubepods//burstable/pod1/c").unwrap(), "kubepods/burstable/pod1/c");
    }

    #[test]
    fn paths_that_climb_or_name_the_root_are_refused() {
        for path in ["", "/", "../x", "a/../../b", "a\nb", "x:y:", "noslice:a:b"] {
            assert!(translate(path).is_err(), "{path:?}");
        }
    }
}
