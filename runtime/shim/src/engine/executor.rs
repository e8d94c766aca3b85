//! How a container's own program is found and executed: with default `PATH`, by the permissions of the very user, and
//! with the words that users of other runtimes know.

use std::collections::HashMap;

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};

use crate::exec::lookup;

/// Marks a lookup failure inside the engine's error text, which is all that crosses its processes.
pub(super) const NOT_FOUND_MARK: &str = "[127]";
/// As above, for a program that exists but may not be executed.
pub(super) const NOT_EXECUTABLE_MARK: &str = "[126]";

#[derive(Debug, Clone, Default)]
pub(super) struct Program;

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let (args, env) = command(spec);
        let name = args.first().map_or("", String::as_str);
        lookup::find(name, &env).map(drop).map_err(|error| {
            let mark = if error.is_not_found() { NOT_FOUND_MARK } else { NOT_EXECUTABLE_MARK };
            ExecutorValidationError::ArgValidationError(format!("{mark}{error}"))
        })
    }

    /// The environment goes to the program as the specification lists it, so the process's own stays as it is; all it
    /// gets is the HOME that was found for the user.
    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(home) = envs.get("HOME") {
            lookup::remember_home(home);
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (args, env) = command(spec);
        // Only failures return. Standard error is the container's: that is where the user will look.
        let error = lookup::execute(&args, &env);
        eprintln!("{error}");
        Err(ExecutorError::Other(error.to_string()))
    }
}

fn command(spec: &Spec) -> (Vec<String>, Vec<String>) {
    let process = spec.process().as_ref();
    let args = process.and_then(|process| process.args().clone()).unwrap_or_default();
    let env = process.and_then(|process| process.env().clone()).unwrap_or_default();
    (args, env)
}
