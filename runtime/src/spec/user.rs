//! Who a container's process runs as: the request, the image's default and the image's own user database.
//!
//! Parsing only; the files are read elsewhere, safely, inside the root file system.

use oarlock_proto::cri;

use super::SpecError;

/// Uids and gids the kernel takes; the last value means "no change" to it.
const ID_MAX: i64 = u32::MAX as i64 - 1;

/// A user as asked for: by number or name, with an optional group by number or name.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Wanted {
    /// Empty: root, or whoever the image says.
    pub user: String,
    pub group: Option<String>,
}

/// The user and groups of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// With the primary group, which comes first.
    pub groups: Vec<u32>,
    /// Home directory, `/` when nobody says.
    pub home: String,
    /// The name in the user database, when there is one.
    pub name: Option<String>,
}

/// Combines the security context with the image's `User` (`user`, `user:group`, in names or numbers).
pub(crate) fn wanted(
    context: Option<&cri::LinuxContainerSecurityContext>,
    image_user: &str,
) -> Result<Wanted, SpecError> {
    let field = |name: &str| format!("linux.security_context.{name}");
    let id = |value: &Option<cri::Int64Value>, name: &str| match value {
        Some(id) if (0..=ID_MAX).contains(&id.value) => Ok(Some(id.value.to_string())),
        Some(id) => Err(SpecError::invalid(field(name), format!("{} is not a valid id", id.value))),
        None => Ok(None),
    };
    let (mut user, mut group) = (String::new(), None);
    if let Some(context) = context {
        group = id(&context.run_as_group, "run_as_group")?;
        user = id(&context.run_as_user, "run_as_user")?.unwrap_or_else(|| context.run_as_username.clone());
        if group.is_some() && user.is_empty() {
            return Err(SpecError::invalid(
                field("run_as_group"),
                "a group needs a user: set run_as_user or run_as_username",
            ));
        }
    }
    if user.is_empty() {
        let (image_user, image_group) = match image_user.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (image_user, None),
        };
        return Ok(Wanted { user: image_user.to_owned(), group: image_group.map(str::to_owned) });
    }
    Ok(Wanted { user, group })
}

/// Looks the user up in the contents of the image's `/etc/passwd` and `/etc/group` (empty when absent), and adds the
/// supplementary groups that the policy wants.
pub(crate) fn resolve(
    wanted: &Wanted,
    passwd: &str,
    group_file: &str,
    supplemental: &[i64],
    policy: cri::SupplementalGroupsPolicy,
) -> Result<Identity, SpecError> {
    let entry = find_user(&wanted.user, passwd)?;
    let gid = match &wanted.group {
        Some(group) => find_group(group, group_file)?,
        None => entry.gid,
    };
    let mut groups = vec![gid];
    let mut add = |gid: u32| {
        if !groups.contains(&gid) {
            groups.push(gid);
        }
    };
    if policy == cri::SupplementalGroupsPolicy::Merge
        && let Some(name) = &entry.name
    {
        member_of(name, group_file).for_each(&mut add);
    }
    for id in supplemental {
        let id = u32::try_from(*id).ok().filter(|id| i64::from(*id) <= ID_MAX);
        add(id.ok_or_else(|| {
            SpecError::invalid("linux.security_context.supplemental_groups", "a group id is out of range")
        })?);
    }
    Ok(Identity { uid: entry.uid, gid, groups, home: entry.home, name: entry.name })
}

struct Entry {
    uid: u32,
    gid: u32,
    home: String,
    name: Option<String>,
}

fn find_user(user: &str, passwd: &str) -> Result<Entry, SpecError> {
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok().filter(|id| i64::from(*id) <= ID_MAX);
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, rest @ ..] = fields.as_slice() else { return None };
        let home = rest.get(1).copied().filter(|home| home.starts_with('/')).unwrap_or("/");
        Some(Entry {
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: home.to_owned(),
            name: Some((*name).to_owned()),
        })
    };
    let mut entries = passwd.lines().filter_map(parse);
    let found = entries.find(|entry| match number {
        Some(uid) => entry.uid == uid,
        None => entry.name.as_deref() == Some(user),
    });
    match (found, number) {
        (Some(entry), _) => Ok(entry),
        (None, Some(uid)) => Ok(Entry { uid, gid: 0, home: "/".to_owned(), name: None }),
        (None, None) => Err(SpecError::invalid("user", format!("no user {user:?} in the image's /etc/passwd"))),
    }
}

fn find_group(group: &str, group_file: &str) -> Result<u32, SpecError> {
    if let Some(gid) = group.parse::<u32>().ok().filter(|id| i64::from(*id) <= ID_MAX) {
        return Ok(gid);
    }
    group_lines(group_file)
        .find(|(name, _, _)| *name == group)
        .map(|(_, gid, _)| gid)
        .ok_or_else(|| SpecError::invalid("group", format!("no group {group:?} in the image's /etc/group")))
}

fn member_of<'a>(user: &'a str, group_file: &'a str) -> impl Iterator<Item = u32> + 'a {
    group_lines(group_file)
        .filter(move |(_, _, members)| members.split(',').any(|member| member == user))
        .map(|(_, gid, _)| gid)
}

fn group_lines(group_file: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group_file.lines().filter_map(|line| {
        let mut fields = line.splitn(4, ':');
        let (name, _, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some((name, gid.parse().ok()?, members.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oarlock_proto::cri::SupplementalGroupsPolicy::{Merge, Strict};

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken line\napp:x:1000:1000::/home/app:/bin/sh\n";
    const GROUP: &str = "root:x:0:\napp:x:1000:\ncrew:x:50:app,other\n";

    fn by(user: &str, group: Option<&str>) -> Wanted {
        Wanted { user: user.to_owned(), group: group.map(str::to_owned) }
    }

    #[test]
    fn a_name_gives_its_ids_home_and_groups() {
        let identity = resolve(&by("app", None), PASSWD, GROUP, &[7], Merge).unwrap();
        assert_eq!((identity.uid, identity.gid, identity.home.as_str()), (1000, 1000, "/home/app"));
        assert_eq!(identity.groups, [1000, 50, 7]);
        assert_eq!(resolve(&by("app", None), PASSWD, GROUP, &[7], Strict).unwrap().groups, [1000, 7]);
    }

    #[test]
    fn a_number_without_an_entry_has_group_zero_and_a_name_without_one_is_refused() {
        assert_eq!(resolve(&by("77", None), PASSWD, GROUP, &[], Merge).unwrap().gid, 0);
        assert!(resolve(&by("ghost", None), PASSWD, GROUP, &[], Merge).is_err());
        assert!(resolve(&by("app", Some("ghosts")), PASSWD, GROUP, &[], Merge).is_err());
        assert_eq!(resolve(&by("0", Some("crew")), PASSWD, GROUP, &[], Merge).unwrap().gid, 50);
    }

    #[test]
    fn the_request_goes_before_the_image_and_a_group_needs_a_user() {
        let context = |user, group| cri::LinuxContainerSecurityContext {
            run_as_user: user,
            run_as_group: group,
            ..cri::LinuxContainerSecurityContext::default()
        };
        let id = |value| Some(cri::Int64Value { value });
        assert_eq!(wanted(Some(&context(id(5), id(6))), "app:crew").unwrap(), by("5", Some("6")));
        assert_eq!(wanted(Some(&context(None, None)), "app:crew").unwrap(), by("app", Some("crew")));
        assert!(wanted(Some(&context(None, id(6))), "app").is_err());
        assert!(wanted(Some(&context(id(-1), None)), "").is_err());
    }
}
