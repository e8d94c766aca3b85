//! Names of groups: plain relative paths, and their translation from the systemd form. Pure.

use crate::CgroupError;

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
        let unit = if unit.ends_with(".slice") { unit } else { format!("{unit}.scope") };
        return clean(&format!("{parents}/{unit}")).ok_or_else(bad);
    }
    clean(path).ok_or_else(bad)
}

/// `a-b-c.slice` lies in `a-b.slice`, which lies in `a.slice`.
fn expand_slice(slice: &str) -> Option<String> {
    let stem = slice.strip_suffix(".slice")?;
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
