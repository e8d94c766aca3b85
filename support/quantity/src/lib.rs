//! Resource quantities (`500m`, `1.5Gi`, `1e3`): parsing, the canonical form, comparison and whole numbers. Owns the
//! notation; knows no resource and no object.
//!
//! Values are kept in billionths, rounded away from zero, as the API does.

use std::cmp::Ordering;

const NANO: i128 = 1_000_000_000;
/// Larger magnitudes are capped, as upstream caps at 2^63-1 whole units.
const CAP: i128 = (i64::MAX as i128) * NANO;

const PATTERN: &str = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("{PATTERN}")]
    Format,
    #[error("unable to parse quantity's suffix")]
    Suffix,
    #[error("unable to parse numeric part of quantity")]
    Numeric,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    DecimalSi,
    BinarySi,
    Exponent,
}

/// A parsed quantity. Equality and order are those of the value, whatever the suffix.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}
impl Eq for Quantity {}
impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl Quantity {
    /// From JSON, where a plain number is a quantity too.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, QuantityError> {
        match value {
            serde_json::Value::String(text) => text.trim().parse(),
            serde_json::Value::Number(number) => number.to_string().parse(),
            _ => Err(QuantityError::Format),
        }
    }

    /// A whole number that prints in powers of 1024: `64Mi`.
    pub fn binary(value: i64) -> Self {
        Self { nanos: i128::from(value) * NANO, format: Format::BinarySi }
    }

    /// Whole units, rounded up.
    pub fn value(&self) -> i64 {
        clamp(div_ceil(self.nanos, NANO))
    }

    /// Thousandths, rounded up.
    pub fn milli_value(&self) -> i64 {
        clamp(div_ceil(self.nanos, NANO / 1000))
    }

    /// -1, 0 or 1.
    pub fn sign(&self) -> i32 {
        self.nanos.signum() as i32
    }

    /// Whether the value has no fraction.
    pub fn is_whole(&self) -> bool {
        self.nanos % NANO == 0
    }

    /// Whether the value is a multiple of one thousandth.
    pub fn is_whole_milli(&self) -> bool {
        self.nanos % (NANO / 1000) == 0
    }
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

/// Division that rounds away from zero.
fn div_ceil(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by == 0 { quotient } else { quotient + value.signum() }
}

/// Whole units (bytes, pods, devices) of a quantity's text, rounded away from zero and capped at the limits of i64. None
/// when it is no quantity.
pub fn units(text: &str) -> Option<i64> {
    text.trim().parse().ok().map(|quantity: Quantity| quantity.value())
}

/// Thousandths (CPU) of a quantity's text, rounded away from zero and capped at the limits of i64. None when it is no
/// quantity.
pub fn milli(text: &str) -> Option<i64> {
    text.trim().parse().ok().map(|quantity: Quantity| quantity.milli_value())
}

/// Multiplier of a suffix as (base, exponent).
fn suffix_scale(suffix: &str) -> Result<(Format, i128, i32), QuantityError> {
    use Format::{BinarySi, DecimalSi, Exponent};
    Ok(match suffix {
        "n" => (DecimalSi, 10, -9),
        "u" => (DecimalSi, 10, -6),
        "m" => (DecimalSi, 10, -3),
        "" => (DecimalSi, 10, 0),
        "k" => (DecimalSi, 10, 3),
        "M" => (DecimalSi, 10, 6),
        "G" => (DecimalSi, 10, 9),
        "T" => (DecimalSi, 10, 12),
        "P" => (DecimalSi, 10, 15),
        "E" => (DecimalSi, 10, 18),
        "Ki" => (BinarySi, 2, 10),
        "Mi" => (BinarySi, 2, 20),
        "Gi" => (BinarySi, 2, 30),
        "Ti" => (BinarySi, 2, 40),
        "Pi" => (BinarySi, 2, 50),
        "Ei" => (BinarySi, 2, 60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError::Suffix)?;
            let exponent: i32 = exponent.parse().map_err(|_| QuantityError::Suffix)?;
            (Exponent, 10, exponent)
        }
    })
}

impl std::str::FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        let negative = text.starts_with('-');
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        if number.is_empty() {
            return Err(QuantityError::Format);
        }
        let allowed = |c: char| c.is_ascii_digit() || "eEinumkKMGTP+-".contains(c);
        if !suffix.chars().all(allowed) {
            return Err(QuantityError::Format);
        }
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
            return Err(QuantityError::Numeric);
        }
        let (format, base, exponent) = suffix_scale(suffix)?;
        let magnitude = scale(whole, fraction, base, exponent);
        let nanos = if negative { -magnitude } else { magnitude };
        Ok(Self { nanos, format })
    }
}

/// `whole.fraction × base^exponent` in billionths, rounded up and capped.
fn scale(whole: &str, fraction: &str, base: i128, exponent: i32) -> i128 {
    // More digits than this are beyond the cap or below a billionth.
    let fraction = &fraction[..fraction.len().min(19)];
    let mut digits: i128 = 0;
    for digit in whole.bytes().chain(fraction.bytes()) {
        digits = match digits.checked_mul(10).and_then(|value| value.checked_add(i128::from(digit - b'0'))) {
            Some(value) => value,
            None => return CAP,
        };
    }
    if digits == 0 {
        return 0;
    }
    if base == 2 {
        let shifted = digits.checked_mul(NANO).and_then(|value| value.checked_mul(1i128 << exponent.min(60)));
        let divisor = 10i128.pow(fraction.len() as u32);
        return match shifted {
            Some(value) => div_ceil(value, divisor).min(CAP),
            None => digits
                .checked_mul(1i128 << exponent.min(60))
                .map_or(CAP, |value| div_ceil(value, divisor).checked_mul(NANO).map_or(CAP, |value| value.min(CAP))),
        };
    }
    let power = i64::from(exponent) + 9 - fraction.len() as i64;
    match power {
        0.. => 10i128
            .checked_pow(power.min(60) as u32)
            .and_then(|factor| digits.checked_mul(factor))
            .map_or(CAP, |value| value.min(CAP)),
        _ => match 10i128.checked_pow(power.unsigned_abs().min(60) as u32) {
            Some(divisor) => div_ceil(digits, divisor).min(CAP),
            None => 1,
        },
    }
}

impl std::fmt::Display for Quantity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.format {
            Format::BinarySi if self.nanos.abs() >= 1024 * NANO => {
                let mut value = div_ceil(self.nanos, NANO);
                let mut suffixes = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].iter();
                let mut suffix = suffixes.next();
                while value % 1024 == 0 && value != 0 {
                    let Some(next) = suffixes.next() else { break };
                    value /= 1024;
                    suffix = Some(next);
                }
                write!(f, "{value}{}", suffix.unwrap_or(&""))
            }
            Format::DecimalSi | Format::BinarySi => {
                let suffixes = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
                let (value, steps) = thousands(self.nanos, suffixes.len() - 1);
                write!(f, "{value}{}", suffixes[steps])
            }
            Format::Exponent => {
                let (value, steps) = thousands(self.nanos, 12);
                match steps as i32 * 3 - 9 {
                    0 => write!(f, "{value}"),
                    exponent => write!(f, "{value}e{exponent}"),
                }
            }
        }
    }
}

/// Takes factors of a thousand out of billionths, as many as leave no fraction; zero is whole units.
fn thousands(nanos: i128, most: usize) -> (i128, usize) {
    if nanos == 0 {
        return (0, 3);
    }
    let (mut value, mut steps) = (nanos, 0);
    while steps < most && value % 1000 == 0 {
        value /= 1000;
        steps += 1;
    }
    (value, steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_print_in_canonical_form() {
        for (given, canonical) in [
            ("0.5", "500m"),
            ("1000m", "1"),
            ("1", "1"),
            ("1024Mi", "1Gi"),
            ("1500Mi", "1500Mi"),
            ("0.5Gi", "512Mi"),
            ("1Ki", "1Ki"),
            ("512", "512"),
            ("100k", "100k"),
            ("1000k", "1M"),
            ("1e3", "1e3"),
            ("12e6", "12e6"),
            ("0", "0"),
            ("-1.5", "-1500m"),
            ("100n", "100n"),
            ("0.0000000001", "1n"),
            ("0.5Ki", "512"),
            ("128974848", "128974848"),
            ("129M", "129M"),
            ("1.0", "1"),
        ] {
            assert_eq!(given.parse::<Quantity>().expect(given).to_string(), canonical, "{given}");
        }
    }

    #[test]
    fn what_is_not_a_quantity_is_refused() {
        for text in ["", "abc", "1x", "-", "1 Gi", "1.2.3", "10Q", "e3", "1Mii"] {
            assert!(text.parse::<Quantity>().is_err(), "{text}");
        }
        assert_eq!("1eM".parse::<Quantity>(), Err(QuantityError::Suffix));
    }

    #[test]
    fn values_compare_across_suffixes() {
        let parse = |text: &str| text.parse::<Quantity>().expect(text);
        assert_eq!(parse("1Gi"), parse("1024Mi"));
        assert!(parse("100m") < parse("1"));
        assert_eq!(parse("1500m").value(), 2);
        assert_eq!(parse("1.5").milli_value(), 1500);
    }

    #[test]
    fn whole_numbers_round_away_from_zero_and_are_capped() {
        for (text, thousandths, whole) in [
            ("100m", 100, 1),
            ("1", 1000, 1),
            (".5", 500, 1),
            ("1.5", 1500, 2),
            ("2Ki", 2_048_000, 2048),
            ("1e3", 1_000_000, 1000),
            ("1E", i64::MAX, 1_000_000_000_000_000_000),
            ("100u", 1, 1),
            ("-1500m", -1500, -2),
            (" 64Mi ", 67_108_864_000, 67_108_864),
            ("1e99", i64::MAX, i64::MAX),
            ("99999999999999999999999999999999999999999", i64::MAX, i64::MAX),
        ] {
            assert_eq!((milli(text), units(text)), (Some(thousandths), Some(whole)), "{text}");
        }
        for text in ["", "m", "x", "1.2.3", "1Zi", "--1", "1e99999999999"] {
            assert_eq!((milli(text), units(text)), (None, None), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whole_numbers_come_back(number in -1_000_000_000_000i64..1_000_000_000_000) {
            proptest::prop_assert_eq!(units(&number.to_string()), Some(number));
            proptest::prop_assert_eq!(milli(&format!("{number}m")), Some(number));
            proptest::prop_assert_eq!(units(&format!("{number}Ki")), Some(number * 1024));
        }

        #[test]
        fn thousandths_never_fall_short_of_units(text in "[0-9]{1,12}(\\.[0-9]{1,12})?(n|u|m|k|M|Ki|Mi)?") {
            let (thousandths, whole) = (milli(&text).expect("a quantity"), units(&text).expect("a quantity"));
            let up = thousandths / 1000 + i64::from(thousandths % 1000 != 0);
            proptest::prop_assert!(thousandths == i64::MAX || up == whole, "{} {} {}", text, thousandths, whole);
        }

        #[test]
        fn any_text_is_survived(text in ".{0,40}") {
            let _ = (milli(&text), units(&text));
        }

        #[test]
        fn any_text_parses_or_fails_and_the_canonical_form_is_stable(text in "[-+]?[0-9.]{0,30}[eEinumkKMGTP]{0,3}[0-9]{0,4}") {
            if let Ok(quantity) = text.parse::<Quantity>() {
                let printed = quantity.to_string();
                let again: Quantity = printed.parse().expect("canonical text parses");
                proptest::prop_assert_eq!(again.to_string(), printed);
            }
        }
    }
}
