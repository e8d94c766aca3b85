//! Merges a container's configuration with its image's: command line, environment, working directory, volumes.

use oarlock_proto::cri;
use oci_spec::image::{Config, ImageConfiguration};

use super::SpecError;

/// Where programs are looked for when neither image nor container says.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The image's defaults for a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Defaults {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
    pub volumes: Vec<String>,
    pub stop_signal: Option<String>,
}

impl Defaults {
    /// Reads them out of an image's configuration.
    pub(crate) fn of(image: &ImageConfiguration) -> Defaults {
        let Some(config) = image.config() else { return Defaults::default() };
        let list = |get: fn(&Config) -> &Option<Vec<String>>| get(config).clone().unwrap_or_default();
        Defaults {
            entrypoint: list(Config::entrypoint),
            cmd: list(Config::cmd),
            env: list(Config::env),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            volumes: list(Config::volumes),
            stop_signal: config.stop_signal().clone().filter(|signal| !signal.is_empty()),
        }
    }
}

/// The command line: a command replaces the image's entrypoint and makes its arguments void; arguments alone replace
/// the image's.
pub(crate) fn command_line(config: &cri::ContainerConfig, defaults: &Defaults) -> Result<Vec<String>, SpecError> {
    let (entrypoint, default_args) = match config.command.is_empty() {
        true => (&defaults.entrypoint, &defaults.cmd),
        false => (&config.command, &Vec::new()),
    };
    let args = if config.args.is_empty() { default_args } else { &config.args };
    let line: Vec<String> = entrypoint.iter().chain(args).cloned().collect();
    match line.first() {
        None => Err(SpecError::invalid("command", "no command specified, and the image has none")),
        Some(program) if program.is_empty() => Err(SpecError::invalid("command", "the program's name is empty")),
        Some(_) if line.iter().any(|word| word.contains('\0')) => {
            Err(SpecError::invalid("command", "a word has a NUL byte"))
        }
        Some(_) => Ok(line),
    }
}

/// What the runtime itself puts into the environment where nobody else did.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnVariables<'a> {
    pub hostname: &'a str,
    pub home: &'a str,
    pub tty: bool,
}

/// The environment: the container's over the image's over our own.
pub(crate) fn environment(
    config: &cri::ContainerConfig,
    defaults: &Defaults,
    own: &OwnVariables<'_>,
) -> Result<Vec<String>, SpecError> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |key: &str, value: &str| match env.iter_mut().find(|(known, _)| known == key) {
        Some(entry) => entry.1 = value.to_owned(),
        None => env.push((key.to_owned(), value.to_owned())),
    };
    set("PATH", DEFAULT_PATH);
    set("HOSTNAME", own.hostname);
    set("HOME", own.home);
    if own.tty {
        set("TERM", "xterm");
    }
    for entry in &defaults.env {
        let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
        set(key, value);
    }
    for variable in &config.envs {
        let problem = |problem: &str| SpecError::invalid(format!("envs[{}]", variable.key), problem);
        if variable.key.is_empty() || variable.key.contains('=') || variable.key.contains('\0') {
            return Err(problem("not a name for a variable"));
        }
        let value = std::str::from_utf8(&variable.value).map_err(|_| problem("the value is not UTF-8"))?;
        if value.contains('\0') {
            return Err(problem("the value has a NUL byte"));
        }
        set(&variable.key, value);
    }
    Ok(env.into_iter().map(|(key, value)| format!("{key}={value}")).collect())
}

/// The working directory: absolute, and not one that would lead through the runtime's own descriptors.
pub(crate) fn working_dir(config: &cri::ContainerConfig, defaults: &Defaults) -> Result<String, SpecError> {
    let wanted = [&config.working_dir, &defaults.working_dir].into_iter().find(|dir| !dir.is_empty());
    let dir = wanted.map_or("/", String::as_str);
    if !dir.starts_with('/') {
        return Err(SpecError::invalid("working_dir", format!("{dir:?} is not an absolute path")));
    }
    let parts: Vec<&str> = dir.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if let ["proc", _, "fd" | "cwd" | "root", ..] | ["proc", "self" | "thread-self", "task", ..] = parts.as_slice() {
        return Err(SpecError::invalid("working_dir", format!("{dir:?} leads through a process's own files")));
    }
    Ok(dir.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn defaults() -> Defaults {
        Defaults { entrypoint: words(&["/entry"]), cmd: words(&["a", "b"]), ..Defaults::default() }
    }

    fn config(command: &[&str], args: &[&str]) -> cri::ContainerConfig {
        cri::ContainerConfig { command: words(command), args: words(args), ..cri::ContainerConfig::default() }
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd_as_documented() {
        assert_eq!(command_line(&config(&[], &[]), &defaults()).unwrap(), ["/entry", "a", "b"]);
        assert_eq!(command_line(&config(&[], &["x"]), &defaults()).unwrap(), ["/entry", "x"]);
        assert_eq!(command_line(&config(&["/c"], &[]), &defaults()).unwrap(), ["/c"]);
        assert_eq!(command_line(&config(&["/c"], &["x"]), &defaults()).unwrap(), ["/c", "x"]);
        assert!(command_line(&config(&[], &[]), &Defaults::default()).is_err());
    }

    #[test]
    fn a_later_variable_wins_and_path_is_always_there() {
        let mut config = config(&[], &[]);
        config.envs = vec![cri::KeyValue { key: "A".into(), value: b"container".to_vec() }];
        let defaults = Defaults { env: words(&["A=image", "B=image"]), ..Defaults::default() };
        let own = OwnVariables { hostname: "h", home: "/root", tty: false };
        let env = environment(&config, &defaults, &own).unwrap();
        assert!(env.contains(&"A=container".to_owned()) && env.contains(&"B=image".to_owned()));
        assert!(env.iter().any(|entry| entry.starts_with("PATH=/usr/local/sbin")));
        assert!(!env.iter().any(|entry| entry.starts_with("TERM=")));
    }

    #[test]
    fn a_working_directory_behind_our_descriptors_is_refused() {
        for dir in ["/proc/self/fd/7", "/proc//self/./fd/7", "/proc/1/cwd", "/proc/thread-self/fd/3", "relative"] {
            let config = cri::ContainerConfig { working_dir: dir.into(), ..cri::ContainerConfig::default() };
            assert!(working_dir(&config, &Defaults::default()).is_err(), "{dir}");
        }
        assert_eq!(working_dir(&cri::ContainerConfig::default(), &Defaults::default()).unwrap(), "/");
    }
}
