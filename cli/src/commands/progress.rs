//! Bars for layers on their way, on a terminal. Pure but for the writing.

use std::io::{self, Write};

use oarlock_proto::images::LayerProgress;

use super::images::size;

const BAR_CELLS: usize = 30;
const DIGITS: usize = 12;

/// Bars that are drawn over one another.
#[derive(Default)]
pub(crate) struct Bars {
    /// How many lines are drawn.
    drawn: usize,
}

impl Bars {
    /// Draws the present state over the one before.
    pub(crate) fn draw(&mut self, layers: &[LayerProgress], out: &mut impl Write) -> io::Result<()> {
        if self.drawn > 0 {
            // Up to the first line.
            write!(out, "\x1b[{}A", self.drawn)?;
        }
        for layer in layers {
            writeln!(out, "\x1b[2K{}", line(layer))?;
        }
        self.drawn = layers.len();
        out.flush()
    }
}

fn line(layer: &LayerProgress) -> String {
    let digest: String = layer.digest.trim_start_matches("sha256:").chars().take(DIGITS).collect();
    if layer.done {
        return format!("{digest} done {:>width$}", size(layer.of), width = BAR_CELLS + 5);
    }
    let part = usize::try_from(layer.bytes.saturating_mul(BAR_CELLS as u64) / layer.of.max(1)).unwrap_or(BAR_CELLS);
    let full = part.min(BAR_CELLS);
    let bar = format!("{}{}", "=".repeat(full), " ".repeat(BAR_CELLS - full));
    format!("{digest} [{bar}] {} of {}", size(layer.bytes), size(layer.of))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(bytes: u64, of: u64, done: bool) -> LayerProgress {
        LayerProgress { digest: format!("sha256:{}", "a".repeat(64)), bytes, of, done }
    }

    #[test]
    fn a_bar_is_as_full_as_the_layer_is_there() {
        assert_eq!(
            line(&layer(500, 1000, false)),
            format!("aaaaaaaaaaaa [{}{}] 500 B of 1.0 kB", "=".repeat(15), " ".repeat(15))
        );
        assert!(line(&layer(5, 0, false)).contains(&"=".repeat(BAR_CELLS)));
        assert!(line(&layer(1000, 1000, true)).starts_with("aaaaaaaaaaaa done"));
    }

    #[test]
    fn the_second_drawing_covers_the_first() {
        let (mut bars, mut out) = (Bars::default(), Vec::new());
        bars.draw(&[layer(1, 2, false), layer(1, 2, false)], &mut out).unwrap();
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 2);
        out.clear();
        bars.draw(&[layer(2, 2, true), layer(1, 2, false)], &mut out).unwrap();
        assert!(out.starts_with(b"\x1b[2A\x1b[2K"));
    }
}
