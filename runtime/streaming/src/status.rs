//! How the end of a command is told on the error channel. Pure.

use serde_json::json;

/// How a command or an attach ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    Success,
    /// The command ran and gave this code (never 0).
    ExitCode(i32),
    Failed(String),
}

/// Versions of the remote command protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V1,
    V2,
    V3,
    V4,
    V5,
}

impl Ending {
    /// What goes over the error channel; nothing at all for a success before v4.
    pub fn render(&self, version: Version) -> Vec<u8> {
        if version < Version::V4 {
            return match self {
                Ending::Success => Vec::new(),
                Ending::ExitCode(code) => exit_message(*code).into_bytes(),
                Ending::Failed(message) => message.clone().into_bytes(),
            };
        }
        let status = match self {
            Ending::Success => json!({"metadata": {}, "status": "Success"}),
            Ending::ExitCode(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": exit_message(*code),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Ending::Failed(message) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {message}"),
                "reason": "InternalError",
                "details": {"causes": [{"message": message}]},
                "code": 500,
            }),
        };
        status.to_string().into_bytes()
    }
}

fn exit_message(code: i32) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn exit_codes_are_causes_in_v4() {
        let status: Value = serde_json::from_slice(&Ending::ExitCode(42).render(Version::V4)).unwrap();
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "42"}));
        let success: Value = serde_json::from_slice(&Ending::Success.render(Version::V5)).unwrap();
        assert_eq!(success["status"], "Success");
    }

    #[test]
    fn older_versions_get_text() {
        assert!(Ending::Success.render(Version::V1).is_empty());
        let text = String::from_utf8(Ending::ExitCode(3).render(Version::V3)).unwrap();
        assert_eq!(text, "command terminated with non-zero exit code: exit status 3");
        assert_eq!(Ending::Failed("no such container".into()).render(Version::V2), b"no such container");
    }
}
