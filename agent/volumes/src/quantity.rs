//! Just enough of Kubernetes quantities to divide one by another. Pure.

/// A quantity's value in thousandths, rounded up; None when the text is not a quantity or far out of range.
pub(crate) fn parse_milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let end = text
        .char_indices()
        .find(|(index, c)| !(c.is_ascii_digit() || *c == '.' || (*index == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(index, _)| index);
    let (number, suffix) = text.split_at(end);
    let negative = number.starts_with('-');
    let digits = number.trim_start_matches(['+', '-']);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || digits.len() > 24 {
        return None;
    }
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (numerator, denominator) = scale(suffix)?;
    let numerator = mantissa.checked_mul(numerator)?.checked_mul(1000)?;
    let denominator = denominator.checked_mul(10i128.checked_pow(fraction.len() as u32)?)?;
    let milli = numerator.checked_add(denominator - 1)? / denominator;
    Some(if negative { -milli } else { milli })
}

/// The value as a whole number of units, rounded up.
pub(crate) fn parse_units(text: &str) -> Option<u64> {
    u64::try_from((parse_milli(text)? + 999) / 1000).ok()
}

/// A suffix as numerator and denominator.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1000i128.pow(2), 1),
        "G" => (1000i128.pow(3), 1),
        "T" => (1000i128.pow(4), 1),
        "P" => (1000i128.pow(5), 1),
        "E" => (1000i128.pow(6), 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            match exponent {
                0..=18 => (10i128.pow(exponent as u32), 1),
                -18..=-1 => (1, 10i128.pow(exponent.unsigned_abs())),
                _ => return None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_usual_spellings() {
        for (text, milli) in [
            ("1", 1000),
            ("250m", 250),
            ("1.5", 1500),
            ("64Mi", 67_108_864_000),
            ("2k", 2_000_000),
            ("1e3", 1_000_000),
            ("0.5Ki", 512_000),
            ("-1", -1000),
            ("1u", 1),
        ] {
            assert_eq!(parse_milli(text), Some(milli), "{text}");
        }
        for text in ["", "m", "1.2.3", "abc", "1Zi", "1e99", "--1"] {
            assert_eq!(parse_milli(text), None, "{text}");
        }
        assert_eq!(parse_units("1500m"), Some(2));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = parse_milli(&text);
        }

        #[test]
        fn whole_numbers_come_back(value in 0u64..1_000_000_000_000) {
            prop_assert_eq!(parse_units(&value.to_string()), Some(value));
        }
    }
}
